"""What a router is told of its models: sections, what is withheld, what stays as it is, and the folder of links."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes import FakeLlamaServer
from llamavisor import binary, preset
from llamavisor.budgets import Allowance
from llamavisor.catalog import FileId
from llamavisor.helptext import FlagSet
from llamavisor.offer import link_all, make_offer, to_preset
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.rules import ModelSettings
from llamavisor.sections import ModelSpec
from llamavisor.shelf import Offer, Offered

BASE = (OptionLayer("[defaults]", ModelOptions(ctx_size=1024)),)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> FlagSet:
    """The options of the fake build, which are those of the true one."""
    found = FakeLlamaServer.make(tmp_path_factory.mktemp("fake"))
    return binary.probe(Path(str(found)), {"PATH": "/usr/bin:/bin"}).flags


def spec(
    name: str, *, content: int = 1, path: str = "", layers: tuple[OptionLayer, ...] = (), **how: object
) -> ModelSpec:
    """A model of one file."""
    path = path or f"/models/{name}.gguf"
    return ModelSpec(name=name, path=path, files=(FileId(1, 1, 1, content),), layers=layers, **how)


def table(**settings: object) -> tuple[OptionLayer, ...]:
    """A model's own table."""
    return (OptionLayer('[model."x"]', ModelSettings.model_validate(settings)),)


def offer_of(
    known: FlagSet,
    *specs: ModelSpec,
    kept: dict[str, Offered] | None = None,
    before: Offer | None = None,
    missing: dict[str, str] | None = None,
) -> Offer:
    """The offer of these models."""
    return make_offer(
        {each.name: each for each in specs},
        kept=kept or {},
        before=before or Offer(),
        missing=missing or {},
        flags=known,
        binary="llama-server",
    )


def test_a_section_says_all_that_a_model_is_told(known: FlagSet) -> None:
    """A section names the file, and all that its model is told, by its router's tables and by its own."""
    offer = offer_of(known, spec("a"), spec("b", base=BASE, layers=table(threads=3)))
    assert offer.models["a"].section == {"model": "/models/a.gguf"}
    assert offer.models["b"].section == {"ctx-size": "1024", "model": "/models/b.gguf", "threads": "3"}
    preset.lint(to_preset(offer), known)


def test_a_section_says_what_follows_from_the_budget(known: FlagSet) -> None:
    """Another budget is another section; a model that runs keeps its old one to the letter."""
    before = offer_of(known, spec("a", allowance=Allowance(8 * 1024**3, (), 4)))
    assert before.models["a"].section == {"cache-ram": "204", "ctx-size": "4096", "model": "/models/a.gguf"}
    now = spec("a", allowance=Allowance(16 * 1024**3, (), 4))
    assert offer_of(known, now, before=before).models["a"].section["cache-ram"] == "409"
    assert offer_of(known, now, kept=dict(before.models), before=before).models["a"] is before.models["a"]
    preset.lint(to_preset(before), known)


def test_a_model_that_the_build_cannot_serve_is_withheld_alone(known: FlagSet) -> None:
    """A bad table keeps its own model from the router, with the reason, and no other."""
    offer = offer_of(known, spec("a"), spec("b", layers=table(args=("--no-such-option",))))
    assert list(offer.models) == ["a"]
    assert "--no-such-option" in offer.withheld["b"].reason


def test_a_model_whose_files_are_missing_is_withheld_unless_it_runs(known: FlagSet) -> None:
    """What a table names and is not there keeps its model from the router, but never takes one away that runs."""
    missing = {"a": "mmproj /m/eyes.gguf is not there"}
    assert offer_of(known, spec("a"), missing=missing).withheld["a"].reason == missing["a"]
    before = offer_of(known, spec("a"))
    assert list(offer_of(known, spec("a"), kept=dict(before.models), before=before, missing=missing).models) == ["a"]


def test_what_is_kept_stays_as_it_was(known: FlagSet) -> None:
    """A model that runs keeps its old section to the letter, whatever its table says now."""
    before = offer_of(known, spec("a", layers=table(threads=3)))
    kept = dict(before.models)
    offer = offer_of(known, spec("a", layers=table(threads=5)), spec("b"), kept=kept, before=before)
    assert offer.models["a"] is before.models["a"]
    assert offer.models["b"].section == {"model": "/models/b.gguf"}


def test_a_kept_model_without_a_file_stays(known: FlagSet) -> None:
    """A model that runs stays in the offer although it is not to be served any more."""
    before = offer_of(known, spec("a"))
    assert list(offer_of(known, kept=dict(before.models), before=before).models) == ["a"]


def test_an_alias_of_a_kept_model_is_not_given_away(known: FlagSet) -> None:
    """While a model runs under an alias that another one gets, that one does without; then it has it."""
    before = offer_of(known, spec("a", aliases=("best",)))
    now = spec("a"), spec("b", aliases=("best", "good"))
    meanwhile = offer_of(known, *now, kept=dict(before.models), before=before)
    assert meanwhile.models["b"].section["alias"] == "good"
    preset.lint(to_preset(meanwhile), known)
    after = offer_of(known, *now, before=meanwhile)
    assert after.models["b"].section["alias"] == "best,good"


def test_a_name_that_is_an_alias_of_a_kept_model(known: FlagSet) -> None:
    """A model whose name a running one still has as an alias waits; the router would refuse to start with both."""
    before = offer_of(known, spec("a", aliases=("b",)))
    meanwhile = offer_of(known, spec("a"), spec("b"), kept=dict(before.models), before=before)
    assert "alias of a model that is loaded" in meanwhile.withheld["b"].reason
    assert set(offer_of(known, spec("a"), spec("b"), before=meanwhile).models) == {"a", "b"}


def test_a_name_that_an_unchanged_kept_model_has_as_alias(known: FlagSet) -> None:
    """A router keeps the aliases of a model that runs: a file of such a name waits, and all others are told."""
    alpha = spec("alpha", aliases=("foo",))
    before = offer_of(known, alpha)
    meanwhile = offer_of(known, alpha, spec("foo"), spec("new"), kept=dict(before.models), before=before)
    assert set(meanwhile.models) == {"alpha", "new"}
    assert "alias of a model that is loaded" in meanwhile.withheld["foo"].reason
    preset.lint(to_preset(meanwhile), known)


def test_what_did_not_change_is_not_worked_out_again(known: FlagSet) -> None:
    """The same spec gives the very same entry of the offer: ten thousand models are not resolved anew for one."""
    models = [spec(f"m{at}") for at in range(10)]
    before = offer_of(known, *models)
    after = offer_of(known, *models, spec("new"), before=before)
    assert all(after.models[each.name] is before.models[each.name] for each in models)


def test_links(known: FlagSet, tmp_path: Path) -> None:
    """The folder that the router scans holds one link for each model, and nothing else of ours."""
    folder, target = tmp_path / "links", tmp_path / "a.gguf"
    target.touch()
    link_all(folder, offer_of(known, spec("a", path=str(target)), spec("b"), spec("USER/REPO:Q4_K_M")))
    assert {link.name: str(link.readlink()) for link in folder.iterdir()} == {
        "a.gguf": str(target),
        "b.gguf": "/models/b.gguf",
    }
    (folder / "stray").mkdir()
    (folder / "junk.gguf").write_text("junk")
    link_all(folder, offer_of(known, spec("a", path="/elsewhere/a.gguf")))
    assert {link.name for link in folder.iterdir()} == {"a.gguf", "stray"}
    assert str((folder / "a.gguf").readlink()) == "/elsewhere/a.gguf"


def test_a_name_that_no_file_can_have(known: FlagSet, tmp_path: Path) -> None:
    """A model whose name is too long for a file is served by its section alone."""
    offer = offer_of(known, spec("n" * 255))
    link_all(tmp_path / "links", offer)
    assert list((tmp_path / "links").iterdir()) == []
    assert len(offer.models) == 1
