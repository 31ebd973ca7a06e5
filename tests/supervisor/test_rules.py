"""Which tables of single models speak for a name, in which order, and what such a table may say."""

from __future__ import annotations

import fnmatch
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llamavisor.options import ModelOptions
from llamavisor.rules import ModelRule, ModelSettings, alias_problem, matching, split_scale

_PATTERNS = st.text(st.sampled_from("ab*?[]!-."), max_size=6)
_NAMES = st.text(st.sampled_from("ab[]!-."), max_size=6)


def _rules(*patterns: str) -> tuple[ModelRule, ...]:
    return tuple(ModelRule.of(pattern, ModelSettings(ctx_size=i)) for i, pattern in enumerate(patterns))


def _found(name: str, *patterns: str) -> list[str]:
    return [rule.pattern for rule in matching(_rules(*patterns), name)]


@pytest.mark.parametrize(
    ("name", "patterns", "found"),
    [
        ("qwen3-8b", ["*", "qwen*", "qwen3-8b", "llama*"], ["*", "qwen*", "qwen3-8b"]),
        ("qwen3-8b", ["qwen3-8b", "qwen*", "*"], ["*", "qwen*", "qwen3-8b"]),
        ("ab", ["a*", "*b"], ["a*", "*b"]),
        ("ab", ["*b", "a*"], ["*b", "a*"]),
        ("ab", ["a?", "[a-c]b", "[ab]*"], ["[ab]*", "a?", "[a-c]b"]),
        ("Qwen", ["qwen*"], []),
        ("a*b", ["a[*]b", "a*b"], ["a*b", "a[*]b"]),
        ("a\nb", ["a*"], ["a*"]),
        ("aXb", ["a*b", "a[*]b"], ["a*b"]),
    ],
)
def test_the_table_with_more_literal_characters_wins_then_the_later_one(
    name: str, patterns: list[str], found: list[str]
) -> None:
    """All tables that match apply, the winner last; a set of one character is that character."""
    assert _found(name, *patterns) == found


@settings(deadline=None)
@given(st.lists(_PATTERNS, max_size=8), _NAMES)
def test_the_order_is_total_and_the_same_every_time(patterns: list[str], name: str) -> None:
    """Exactly the globs that fnmatch takes for the name apply, in one order, whether they are prepared or not."""
    rules = _rules(*patterns)
    found = matching(rules, name)
    assert {id(rule) for rule in found} == {id(r) for r in rules if fnmatch.fnmatchcase(name, r.pattern)}
    ranks = [(rule.literal_count, rule.settings.ctx_size) for rule in found]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)
    assert found == matching(rules, name) == matching(list(rules), name)


@settings(deadline=None)
@given(_PATTERNS, _NAMES)
def test_a_pattern_with_one_name_matches_that_alone(pattern: str, name: str) -> None:
    """What counts as an exact name is what fnmatch matches with nothing else."""
    (rule,) = _rules(pattern)
    if rule.name is not None:
        assert fnmatch.fnmatchcase(rule.name, pattern)
        assert fnmatch.fnmatchcase(name, pattern) == (name == rule.name)


def test_ten_thousand_names_against_many_tables_take_no_time() -> None:
    """Sixty globs and a table for each of a thousand models, looked up for ten thousand names."""
    rules = _rules(*(f"*{i}-q?_*" for i in range(60)), *(f"model-{i}" for i in range(1000)))
    began = time.process_time()
    found = sum(len(matching(rules, f"model-{i}")) for i in range(10_000))
    assert found == 1000
    assert time.process_time() - began < 2


def test_a_table_knows_everything_that_defaults_knows() -> None:
    """Every option of [defaults] may be written for one model, with the same meaning."""
    assert ModelOptions.model_fields.keys() < ModelSettings.model_fields.keys()
    assert ModelSettings(gpu_layers="12").gpu_layers == 12
    assert not ModelOptions.is_per_model
    assert ModelSettings.is_per_model


def test_a_rule_is_called_as_it_is_written() -> None:
    """Messages name a table by the line that a person looks for."""
    assert ModelRule.of('a"b*', ModelSettings()).source == '[model."a\\"b*"]'
    assert ModelRule.of("qwen*", ModelSettings()).source == '[model."qwen*"]'


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"aliases": ["a,b"]}, "separates aliases"),
        ({"aliases": ["a]b"]}, "holds a ']'"),
        ({"aliases": ["a\nb"]}, "line break"),
        ({"aliases": ["-a"]}, "begins with '-'"),
        ({"aliases": [""]}, "is empty"),
        ({"aliases": ["a:latest"]}, "would be renamed"),
        ({"aliases": ["a#b"]}, "comment"),
        ({"tags": ["a,b"]}, "comma"),
        ({"tags": ["a;b"]}, "comment"),
        ({"load_on_start": "often"}, "boolean"),
        ({"pin": "often"}, "boolean"),
        ({"ttl": "soon"}, 'such as "30s", "10m" or "1h30m"; 0 for never'),
        ({"chat_template": ""}, "not empty"),
        ({"chat_template_kwargs": "chatty"}, "table of names"),
        ({"chat_template_kwargs": [1]}, "table of names"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "JSON does not have"),
        ({"mmproj": 1}, "a path in quotes, or false"),
        ({"draft": ""}, "not empty"),
        ({"draft_max": -1}, "greater than or equal to 0"),
        ({"draft_p_min": 1.5}, "less than or equal to 1"),
        ({"draft_gpu_layers": "most"}, "number of layers"),
        ({"lora": ["a,b"]}, "comma or a quote"),
        ({"lora": ["a:b:0.5"]}, "rename the file"),
        ({"lora": [""]}, "must be a list of paths"),
        ({"env": {"A": "1"}}, "Extra inputs"),
        ({"load-on-startup": True}, "Extra inputs"),
    ],
)
def test_what_a_table_cannot_say_is_refused(written: dict[str, object], message: str) -> None:
    """A value that no llama-server could follow fails with the configuration."""
    with pytest.raises(ValidationError, match=message):
        ModelSettings.model_validate(written)


def test_values_are_taken_in_the_ways_people_write_them() -> None:
    """One alias, tag, router or adapter needs no list; a table becomes JSON that fits into a preset."""
    written = ModelSettings.model_validate(
        {
            "aliases": "a",
            "tags": "t",
            "router": "gpu0",
            "lora": "x.gguf:0.5",
            "mmproj": False,
            "draft": True,
            "chat_template_kwargs": {"enable_thinking": False, "note": "a;b#c é"},
        }
    )
    assert (written.aliases, written.tags, written.router, written.lora) == (("a",), ("t",), ("gpu0",), ("x.gguf:0.5",))
    assert (written.mmproj, written.draft) == (False, True)
    text = written.chat_template_kwargs
    assert text is not None
    assert ";" not in text
    assert "#" not in text
    assert json.loads(text) == {"enable_thinking": False, "note": "a;b#c é"}
    assert ModelSettings(chat_template_kwargs=text) == ModelSettings(chat_template_kwargs=json.loads(text))


def test_equal_tables_are_equal_and_hash_alike() -> None:
    """A configuration that is read again without a change changes nothing."""
    one, other = (ModelRule.of("a", ModelSettings(ctx_size=1, lora=["x"], args=["--top-k", "1"])) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != ModelRule.of("a", ModelSettings(ctx_size=2))


def test_paths_are_anchored_and_names_are_not() -> None:
    """Every path of a table is put through the function, scales and names of templates stay."""
    table = ModelSettings(
        mmproj="m.gguf",
        draft=False,
        lora=("a.gguf", "b.gguf:-1.5"),
        chat_template="chatml",
        grammar_file="g.gbnf",
        slot_save_path="slots",
    )
    anchored = table.anchored(lambda path: f"/etc/{path}")
    assert anchored.model_dump(exclude_unset=True) == {
        "mmproj": "/etc/m.gguf",
        "draft": False,
        "lora": ("/etc/a.gguf", "/etc/b.gguf:-1.5"),
        "chat_template": "chatml",
        "grammar_file": "/etc/g.gbnf",
        "slot_save_path": "/etc/slots",
    }
    assert ModelSettings(chat_template="t.jinja").anchored(lambda p: f"/etc/{p}").chat_template == "/etc/t.jinja"
    plain = ModelSettings(ctx_size=1)
    assert plain.anchored(str) is plain


@pytest.mark.parametrize(
    ("written", "parts"),
    [("a.gguf", ("a.gguf", None)), ("a:0.5", ("a", "0.5")), ("a:-1", ("a", "-1")), ("a:b", ("a:b", None))],
)
def test_a_scale_stands_behind_the_last_colon(written: str, parts: tuple[str, str | None]) -> None:
    """What is no number belongs to the path."""
    assert split_scale(written) == parts


def test_a_quantization_may_be_an_alias() -> None:
    """Names as the Hugging Face cache gives them are not refused."""
    assert alias_problem("org/name:Q4_K_M") is None
