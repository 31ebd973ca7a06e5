"""What the processes of models say, under one scrape: with whose it is, and nothing that is not well formed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llamavisor.usage import KEPT_BYTES
from llamavisord.exposition_children import MAX_SERIES, Gathered

TEXT = b"""\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens \\\\ processed
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 56
# HELP llamacpp:n_tokens_max Largest observed sequence length
# TYPE llamacpp:n_tokens_max counter
llamacpp:n_tokens_max 4000
# HELP llamacpp:prompt_tokens_seconds Average prompt throughput in tokens/s
# TYPE llamacpp:prompt_tokens_seconds gauge
llamacpp:prompt_tokens_seconds 3113.36
# HELP llamacpp:predicted_tokens_seconds Average generation throughput in tokens/s
# TYPE llamacpp:predicted_tokens_seconds gauge
llamacpp:predicted_tokens_seconds 12
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
"""


def shown(*said: tuple[str, bytes]) -> list[str]:
    """The lines of an exposition of what these models of the router main say."""
    gathered = Gathered()
    for model, text in said:
        gathered.take(text, router="main", model=model)
    registry = CollectorRegistry()
    registry.collect = gathered.metrics  # type: ignore[method-assign]
    return generate_latest(registry).decode().splitlines()


def series(*said: tuple[str, bytes]) -> list[str]:
    """Likewise without comments."""
    return [line for line in shown(*said) if not line.startswith("#")]


def test_each_metric_is_told_once_for_all_models() -> None:
    """One HELP and one TYPE, then every model's value; the averages since the last reader are not among them."""
    assert shown(("alpha", TEXT), ("beta", TEXT.replace(b" 56", b" 7"))) == [
        "# HELP llamacpp:prompt_tokens_total Number of prompt tokens \\\\ processed",
        "# TYPE llamacpp:prompt_tokens_total counter",
        'llamacpp:prompt_tokens_total{model="alpha",router="main"} 56.0',
        'llamacpp:prompt_tokens_total{model="beta",router="main"} 7.0',
        "# HELP llamacpp:n_tokens_max Largest observed sequence length",
        "# TYPE llamacpp:n_tokens_max untyped",
        'llamacpp:n_tokens_max{model="alpha",router="main"} 4000.0',
        'llamacpp:n_tokens_max{model="beta",router="main"} 4000.0',
        "# HELP llamacpp:requests_processing Number of requests processing",
        "# TYPE llamacpp:requests_processing gauge",
        'llamacpp:requests_processing{model="alpha",router="main"} 1.0',
        'llamacpp:requests_processing{model="beta",router="main"} 1.0',
    ]


def test_models_that_share_a_label_are_added_up() -> None:
    """Counters and gauges alike, and the buckets of histograms."""
    text = b'# TYPE llamacpp:t histogram\nllamacpp:t_bucket{le="1"} 2\nllamacpp:t_bucket{le="+Inf"} 3\n'
    text += b"llamacpp:t_sum 4.5\nllamacpp:t_count 3\nllamacpp:n_total 1\n"
    assert series(("other", text), ("other", text)) == [
        'llamacpp:t_bucket{le="1",model="other",router="main"} 4.0',
        'llamacpp:t_bucket{le="+Inf",model="other",router="main"} 6.0',
        'llamacpp:t_sum{model="other",router="main"} 9.0',
        'llamacpp:t_count{model="other",router="main"} 6.0',
        'llamacpp:n_total{model="other",router="main"} 2.0',
    ]


def test_own_labels_stay_and_those_that_clash_are_renamed() -> None:
    """As Prometheus does it; an empty label is none."""
    text = rb'llamacpp:x{model="} 5 \"\\\n",router="r",exported_router="s",empty="",} 2 1700000000000'
    renamed = r'exported_exported_router="r",exported_model="} 5 \"\\\n",exported_router="s"'
    assert series(("alpha", text)) == [f'llamacpp:x{{{renamed},model="alpha",router="main"}} 2.0']


@pytest.mark.parametrize(
    "line",
    [
        b"llamacpp:bad many",
        b"llamacpp:bad 1_000",
        b"llamacpp:bad",
        b"llamacpp:bad 1 2 3",
        b"llamacpp:b\xc3\xa4d 1",
        b"other:bad 1",
        b"bad 1",
        b'llamacpp:bad{a="1" 1',
        b"llamacpp:bad{a=1} 1",
        b'llamacpp:bad{a="1"b="2"} 1',
        b'llamacpp:bad{a="1",a="2"} 1',
        b'llamacpp:bad{__name__="x"} 1',
        b'llamacpp:bad{1a="x"} 1',
        b'llamacpp:bad{a="\\"} 1',
        b"# TYPE llamacpp:bad summary\n# TYPE llamacpp:bad",
        b"<html>llamacpp:bad</html>",
        b"\x00",
    ],
)
def test_a_line_that_is_not_well_formed_is_left_out(line: bytes) -> None:
    """All others are shown."""
    assert series(("alpha", line + b"\n" + TEXT)) == series(("alpha", TEXT))


def test_what_is_no_text_is_left_out() -> None:
    """All other lines are shown."""
    assert series(("alpha", b"\xff\xfe 1\n" + TEXT)) == series(("alpha", TEXT))


def test_summaries_are_left_out() -> None:
    """Their quantiles cannot be added up."""
    text = (
        b'# TYPE llamacpp:wait summary\nllamacpp:wait{quantile="0.5"} 1\nllamacpp:wait_sum 3\nllamacpp:wait_count 2\n'
    )
    assert series(("alpha", text + TEXT)) == series(("alpha", TEXT))


def test_the_first_type_counts() -> None:
    """A sample that does not go with what was said of its metric before is left out, whoever says it."""
    one = b"# TYPE llamacpp:x gauge\nllamacpp:x 1\n# TYPE llamacpp:y histogram\nllamacpp:y_count 2\n"
    two = b"# TYPE llamacpp:x counter\nllamacpp:x 3\n# TYPE llamacpp:y gauge\nllamacpp:y 4\n"
    two += b"# TYPE llamacpp:y_count gauge\nllamacpp:y_count 5\n"
    assert shown(("alpha", one), ("beta", two)) == [
        "# HELP llamacpp:x ",
        "# TYPE llamacpp:x gauge",
        'llamacpp:x{model="alpha",router="main"} 1.0',
        'llamacpp:x{model="beta",router="main"} 3.0',
        "# HELP llamacpp:y ",
        "# TYPE llamacpp:y histogram",
        'llamacpp:y_count{model="alpha",router="main"} 2.0',
        'llamacpp:y_count{model="beta",router="main"} 5.0',
    ]


def test_a_series_that_one_process_says_twice_counts_once() -> None:
    """It is no sum of two models."""
    assert series(("alpha", b'llamacpp:x 1\nllamacpp:x{a=""} 2\n')) == ['llamacpp:x{model="alpha",router="main"} 1.0']


def test_one_process_adds_so_many_series_and_no_more() -> None:
    """The others keep theirs."""
    flood = b"".join(b'llamacpp:flood{n="%d"} 1\n' % number for number in range(5 * MAX_SERIES))
    lines = series(("alpha", flood), ("beta", TEXT))
    assert len([line for line in lines if 'model="alpha"' in line]) == MAX_SERIES
    assert len([line for line in lines if 'model="beta"' in line]) == 3


@pytest.mark.parametrize(
    ("begin", "again", "end"),
    [
        (b"llamacpp:x ", b"1", b"x"),
        (b"llamacpp:x", b" ", b"y"),
        (b"llamacpp:x ", b" 1", b""),
        (b"llamacpp:x{", b"} ", b""),
        (b"llamacpp:x{", b"} 1", b"x"),
        (b"llamacpp:x{", b'a="b"', b"} 1"),
        (b"llamacpp:x{", b"a", b"} 1"),
        (b'llamacpp:x{a="', b"\\", b"} 1"),
        (b'llamacpp:x{a="b"', b" ", b"c} 1"),
        (b"# HELP llamacpp:x", b" \t", b"\0"),
        (b"# TYPE ", b" ", b"x"),
        (b"", b"\n", b""),
    ],
)
def test_a_line_that_nearly_is_one_takes_no_longer(begin: bytes, again: bytes, end: bytes) -> None:
    """However long it is: the daemon does nothing else meanwhile."""
    text = begin + again * (KEPT_BYTES // len(again)) + end
    began = time.process_time()
    assert series(("alpha", text), ("beta", TEXT)) == series(("beta", TEXT))
    assert time.process_time() - began < 1.0  # milliseconds; a minute if its length counts twice


_PIECES = st.sampled_from(
    [
        *("llamacpp:x", "llamacpp:x_total", "_bucket", "_created", "model", "le", "a", 'a="b"', "1", "1e9", "nan", "-"),
        *("# TYPE ", "# HELP ", "counter", "gauge", "histogram", "#", "{", "}", '"', "\\", "=", ",", " ", "\t", "\n"),
        "\u2028",
    ]
)


@given(st.lists(st.lists(_PIECES, max_size=60).map("".join), max_size=3))
def test_whatever_is_said_the_scrape_can_be_read(texts: list[str]) -> None:
    """Each series is there once, with the labels of its owner, under one TYPE for each name."""
    lines = shown(*((f"m{number}", text.encode()) for number, text in enumerate(texts)))
    families = list(text_string_to_metric_families("\n".join(lines)))
    names = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(names) == len(set(names)) == len([line for line in lines if not line.startswith("#")])
    assert all({("router", "main")} < set(labels) for _, *labels in names)
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_break_nothing(text: bytes) -> None:
    """What cannot be read is left out."""
    assert series(("alpha", b"llamacpp:" + text), ("beta", TEXT))[-1].startswith("llamacpp:")
