"""Which files make which model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufs import STRING, U16, U32, GgufFile, Tensor, Typed
from llamavisor import gguf
from llamavisor.catalog import Entry, EntryState
from llamavisor.catalog.group import Past, group, remember
from llamavisor.catalog.hub import Snapshot, quantization_tag
from llamavisor.catalog.settle import Verdict
from llamavisor.catalog.split import Judged, join
from llamavisor.catalog.walk import Found
from llamavisor.gguf import Header

READY, SETTLING = EntryState.READY, EntryState.SETTLING
INCOMPLETE, INVALID = EntryState.INCOMPLETE, EntryState.INVALID


def header(architecture: str = "llama", *values: tuple[str, Typed], n_tensors: int = 1) -> Header:
    """Of a file of this architecture."""
    tensors = [Tensor(f"t{number}.weight") for number in range(n_tensors)]
    raw = GgufFile(values=[("general.architecture", (STRING, architecture)), *values], tensors=tensors).encode()
    return gguf.parse(lambda offset, length: raw[offset : offset + length], len(raw))


def model(embedding: int = 64) -> Header:
    """Of a model with embeddings of this length."""
    return header("llama", ("llama.embedding_length", (U32, embedding)))


def projector(length: int = 64, file_type: int = 1) -> Header:
    """Of a projector for such a model; file type 1 is F16, 7 Q8_0, 0 F32."""
    values = [("clip.vision.projection_dim", (U32, length)), ("general.file_type", (U32, file_type))]
    return header("clip", *values)


def part(number: int, count: int, total: int | None = None) -> Header:
    """Of part `number` of a split file, counted from 1 as in its name."""
    values: list[tuple[str, Typed]] = [("split.no", (U16, number - 1)), ("split.count", (U16, count))]
    if total is not None:
        values.append(("split.tensors.count", (5, total)))
    return header("llama", *values)


def adapter() -> Header:
    """Of a LoRA."""
    return header("llama", ("general.type", (STRING, "adapter")), ("adapter.type", (STRING, "lora")))


def file(rel: str, said: Header | None, state: EntryState = READY, reason: str = "", **changes: object) -> Judged:
    """A file that was judged."""
    found = Found(f"/m/{rel}", rel, 1, hash(rel), 1000, 5_000_000_000, 7_000_000_000)
    return Judged(found._replace(**changes), said, Verdict(state, reason))


def entries(*files: Judged) -> dict[str, Entry]:
    """What they make."""
    return group(join(files), (), "/m")


class Looks:
    """Looks that follow each other: each knows what was before."""

    def __init__(self) -> None:
        self.past = Past()

    def __call__(self, *files: Judged) -> dict[str, Entry]:
        """What they make now."""
        units = join(files)
        found = group(units, (), "/m", self.past)
        self.past = remember(units, found, self.past)
        return found


def called(found: dict[str, Entry]) -> dict[str, str]:
    """Names by the files' own."""
    return {entry.path.rpartition("/")[2]: name for name, entry in found.items()}


def test_a_file_is_a_model() -> None:
    """Its entry says where it is, which content it has, and when it was last changed."""
    (entry,) = entries(file("a.gguf", model())).values()
    assert (entry.name, entry.state, entry.path, entry.size_bytes) == ("a", READY, "/m/a.gguf", 1000)
    assert (entry.changed_at, entry.parameter_count, entry.header) == (7.0, 32, model())


def test_what_is_no_model_is_no_entry() -> None:
    """An adapter is used by the configuration; a projector and a draft in the models folder belong to nobody."""
    drafts = header("eagle3")
    assert entries(file("lora.gguf", adapter()), file("mmproj-x.gguf", projector()), file("d.gguf", drafts)) == {}


def test_projector_and_draft_go_with_the_models_of_their_folder() -> None:
    """And with no other folder's."""
    found = entries(
        file("f/a-Q4_K_M.gguf", model()),
        file("f/a-Q8_0.gguf", model()),
        file("f/mmproj-F16.gguf", projector()),
        file("f/mtp-a.gguf", model()),
        file("g/b.gguf", model()),
    )
    assert sorted(found) == ["a-Q8_0", "f", "g"]
    for name in ("f", "a-Q8_0"):
        assert found[name].projector is not None
        assert found[name].projector.path == "/m/f/mmproj-F16.gguf"
        assert found[name].draft is not None
        assert found[name].draft.path == "/m/f/mtp-a.gguf"
    assert found["g"].projector is found["g"].draft is None


def test_of_several_projectors_a_fitting_and_exact_one_is_taken() -> None:
    """F16 before Q8_0, and before both none that makes vectors of another length."""
    found = entries(
        file("f/a.gguf", model()),
        file("f/mmproj-1.gguf", projector(32)),
        file("f/mmproj-2.gguf", projector(file_type=7)),
        file("f/mmproj-3.gguf", projector()),
    )["f"]
    assert found.projector is not None
    assert found.projector.path == "/m/f/mmproj-3.gguf"
    assert not found.notes


def test_a_projector_that_cannot_be_used_is_told() -> None:
    """The model is served without it: of the wrong length, or still being copied. A broken one is an entry."""
    wrong = entries(file("f/a.gguf", model()), file("f/mmproj.gguf", projector(32)))["f"]
    assert wrong.projector is None
    assert wrong.notes == ("mmproj.gguf is not used: it makes vectors of 32 numbers, and this model takes 64",)
    coming = entries(file("f/a.gguf", model()), file("f/mmproj.gguf", None, SETTLING, "it is being written"))
    assert coming["f"].notes == ("mmproj.gguf is not used yet: it is being written",)
    assert list(coming) == ["f"]
    broken = entries(file("f/a.gguf", model()), file("f/mmproj.gguf", None, INVALID, "junk"))
    assert (broken["mmproj"].state, broken["mmproj"].reason, broken["f"].state) == (INVALID, "junk", READY)


def test_a_model_that_is_only_called_a_projector_is_a_model() -> None:
    """What the header says counts where it can be read."""
    assert list(entries(file("with-mmproj.gguf", model()))) == ["with-mmproj"]


def test_parts_are_one_model() -> None:
    """Called without the parts' numbers; the first part is what is loaded, and all count."""
    files = [file(f"a-0000{number}-of-00003.gguf", part(number, 3, 3)) for number in (2, 3, 1)]
    (entry,) = entries(*files).values()
    assert (entry.name, entry.state, entry.size_bytes, entry.parameter_count) == ("a", READY, 3000, 96)
    assert [made.path for made in entry.files] == [f"/m/a-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_a_missing_part_is_named() -> None:
    """One by its name, many by the first of them; also when it is the first."""
    one = entries(file("f/a-00001-of-00003.gguf", part(1, 3)), file("f/a-00003-of-00003.gguf", part(3, 3)))["f"]
    assert (one.state, one.reason) == (INCOMPLETE, "part 2 of 3 is missing: a-00002-of-00003.gguf")
    first = entries(file("a-00002-of-00002.gguf", part(2, 2)))["a"]
    assert (first.state, first.header) == (INCOMPLETE, None)
    assert first.reason == "part 1 of 2 is missing: a-00001-of-00002.gguf"
    many = entries(file("a-00001-of-99999.gguf", None, SETTLING))["a"]
    assert many.reason.startswith("99998 of 99999 parts are missing: a-00002-of-99999.gguf, ")
    assert many.reason.endswith(" and 99995 more")


@pytest.mark.parametrize(
    ("name", "said", "why"),
    [
        ("a-00001-of-00002.gguf", part(2, 2), "by its name it is part 1 of 2, by its header part 2 of 2"),
        ("a-00001-of-00002.gguf", model(), "its header says nothing of parts"),
        ("a-00003-of-00002.gguf", part(1, 2), "there is no part 3 of 2"),
        ("a-00001-of-00002.GGUF", part(1, 2), "rename it"),
        ("a.gguf", part(1, 2), "llama-server wants a-00001-of-00002.gguf"),
        ("a.gguf", part(2, 2), "by its header it is part 2 of 2, but it is not called so"),
    ],
)
def test_a_name_that_contradicts_the_header_is_invalid(name: str, said: Header, why: str) -> None:
    """llama-server would refuse it, or load the wrong file."""
    (entry,) = entries(file(name, said)).values()
    assert entry.state is INVALID
    assert why in entry.reason


def test_parts_of_two_models_are_no_model() -> None:
    """Their tensors do not add up to what the first part says."""
    files = [file(f"a-0000{number}-of-00002.gguf", part(number, 2, 7)) for number in (1, 2)]
    (entry,) = entries(*files).values()
    assert (entry.state, entry.reason) == (INVALID, "its parts hold 2 tensors together, and the first says 7")


def test_a_split_is_as_good_as_its_worst_part() -> None:
    """What is invalid stays so; what is missing is said before what settles."""
    first, second = file("a-00001-of-00002.gguf", part(1, 2)), "a-00002-of-00002.gguf"
    settling = entries(first, file(second, part(2, 2), SETTLING, "it is being written"))["a"]
    assert (settling.state, settling.reason) == (SETTLING, "part 2 of 2: it is being written")
    assert entries(first, file(second, None, INVALID, "junk"))["a"].reason == "part 2 of 2: junk"


def test_one_file_under_two_paths_is_one_model() -> None:
    """Not the link is served, then the less deep path; but a link with a name that the router takes is."""
    same = {"device": 1, "inode": 5}
    found = entries(file("a.gguf", model(), is_link=True, **same), file("f/deep.gguf", model(), **same))
    assert (found["f"].state, found["a"].state) == (READY, INVALID)
    assert found["a"].reason == "the same file as f, which serves it"
    found = entries(file("ok.gguf", model(), is_link=True, **same), file("bad#.gguf", model(), **same))
    assert found["ok"].state is READY


def test_a_path_that_no_preset_carries_is_invalid() -> None:
    """The text behind a '#' would be lost."""
    found = entries(file("c#.gguf", model()))["c#"]
    assert found.state is INVALID
    assert "'#'" in found.reason
    assert "rename" in found.reason


def test_in_the_hubs_cache_a_projector_serves_the_folders_below() -> None:
    """Repositories keep their quantizations in folders, and one projector above them."""
    where = Snapshot("bob/Tiny", "models--bob--Tiny/snapshots/abc")
    found = entries(
        file(f"{where.folder}/Q4_K_M/Tiny-Q4_K_M.gguf", model(), snapshot=where),
        file(f"{where.folder}/mmproj-F16.gguf", projector(), snapshot=where),
    )["bob/Tiny:Q4_K_M"]
    assert found.projector is not None
    assert found.projector.path == f"/m/{where.folder}/mmproj-F16.gguf"


def test_what_is_dropped_beside_a_model_that_works_does_not_rename_it() -> None:
    """Half copied, broken, settling, part of a split or whole: the model keeps its name and its alias."""
    works = file("fam/m-Q8_0.gguf", model())
    for newcomer in (
        file("fam/half.gguf", None, SETTLING, "why"),
        file("fam/half.gguf", None, INVALID, "why"),
        file("fam/half.gguf", model(), SETTLING, "why", mtime_ns=1),
        file("fam/half.gguf", model(), INVALID, "why", mtime_ns=1),
        file("fam/half-00001-of-00002.gguf", part(1, 2), mtime_ns=1),
        file("fam/half-Q4_K_M.gguf", model(), mtime_ns=1),
    ):
        look = Looks()
        alone = look(works)["fam"]
        assert alone.aliases == ("m-Q8_0",)
        together = look(works, newcomer)
        assert together["fam"] == alone
        assert called(together) == {
            "m-Q8_0.gguf": "fam",
            newcomer.found.path.rpartition("/")[2]: newcomer_name(newcomer),
        }


def newcomer_name(newcomer: Judged) -> str:
    """The stem."""
    return newcomer.found.rel.removeprefix("fam/").removesuffix(".gguf").removesuffix("-00001-of-00002")


def test_a_model_that_worked_keeps_its_name_while_it_is_written_over() -> None:
    """It counts as it did: the one beside it does not get the folder's name meanwhile. Once it is gone it does."""
    first, second = file("fam/a.gguf", model()), file("fam/b.gguf", model(), mtime_ns=9_000_000_000)
    look = Looks()
    assert called(look(first, second)) == {"a.gguf": "fam", "b.gguf": "b"}
    for said, state in ((model(), SETTLING), (None, SETTLING), (None, INVALID), (model(), READY)):
        again = file("fam/a.gguf", said, state, "" if state is READY else "why", mtime_ns=10_000_000_000, inode=7)
        assert called(look(again, second)) == {"a.gguf": "fam", "b.gguf": "b"}
    assert called(look(second)) == {"b.gguf": "fam"}
    assert called(look(first, second)) == {"a.gguf": "a", "b.gguf": "fam"}, "who came back is a newcomer"


def test_two_copies_that_are_under_way_do_not_exchange_their_names() -> None:
    """Whichever was written to last; the first that is whole gets the folder's name and keeps it."""
    look = Looks()
    for early, late, state in ((1, 2, SETTLING), (3, 2, SETTLING), (3, 4, SETTLING), (5, 4, READY)):
        files = (
            file("fam/a.gguf", model(), state, "why", mtime_ns=early),
            file("fam/b.gguf", model(), SETTLING, "why", mtime_ns=late),
        )
        assert called(look(*files)) == {"a.gguf": "fam", "b.gguf": "b"}
    look = Looks()
    look(*files[:1])
    files = file("fam/a.gguf", model(), SETTLING, "why"), file("fam/b.gguf", model())
    assert called(Looks()(*files)) == {"a.gguf": "a", "b.gguf": "fam"}


def test_a_model_did_not_change_after_it_was_seen() -> None:
    """An mtime or a clock in the future says nothing; the ctime is the kernel's own."""
    ahead = file("a.gguf", model(), mtime_ns=99_000_000_000)
    assert entries(ahead)["a"].changed_at == 7.0
    assert entries(ahead._replace(seen_at=6.0))["a"].changed_at == 6.0


def test_in_the_hubs_cache_a_projector_of_another_revision_serves() -> None:
    """While an update comes file by file the model is still the old one."""
    shelf = "models--bob--Tiny/snapshots"
    old, new = Snapshot("bob/Tiny", f"{shelf}/old", 1), Snapshot("bob/Tiny", f"{shelf}/new", 0)
    found = entries(
        file(f"{shelf}/old/Q8_0/Tiny-Q8_0.gguf", model(), snapshot=old),
        file(f"{shelf}/new/mmproj-F16.gguf", projector(), snapshot=new),
    )["bob/Tiny:Q8_0"]
    assert found.projector is not None
    assert found.projector.path == f"/m/{shelf}/new/mmproj-F16.gguf"


HEADERS = [None, model(), model(32), projector(), part(1, 2), part(2, 2), adapter(), header("bert"), header("eagle3")]
STEMS = ["a", "b", "mmproj-a", "mtp-a", "a-00001-of-00002", "a-00002-of-00002", "-x", "y,z", "q-Q4_K_M"]
FILES = st.lists(
    st.builds(
        lambda folder, stem, said, state, inode, is_link: file(
            f"{folder}{stem}.gguf", said, state, "why" if state is not READY else "", inode=inode, is_link=is_link
        ),
        st.sampled_from(["", "f/", "f/g/", "h/"]),
        st.sampled_from(STEMS),
        st.sampled_from(HEADERS),
        st.sampled_from([READY, SETTLING, INVALID]),
        st.integers(1, 4),
        st.booleans(),
    ),
    unique_by=lambda judged: judged.found.rel,
    max_size=12,
)


@given(FILES, st.randoms())
def test_the_order_of_the_files_changes_nothing(files: list[Judged], shuffled: random.Random) -> None:
    """Every entry is the same; every one that cannot be used says why; no path makes two models."""
    before = entries(*files)
    shuffled.shuffle(files)
    assert list(entries(*files).items()) == list(before.items())
    paths = [made.path for entry in before.values() for made in entry.files]
    assert len(paths) == len(set(paths))
    for name, entry in before.items():
        assert name == entry.name
        assert bool(entry.reason) is (entry.state is not READY)
        assert not (entry.state is READY and entry.header is None and len(entry.files) > 1)
    usable = [entry.files[0].id for entry in before.values() if entry.state is READY]
    assert len(usable) == len(set(usable))


@given(FILES)
def test_names_do_not_depend_on_what_is_still_being_written(files: list[Judged]) -> None:
    """A copy that comes to its end renames nothing, except the folder's alias."""
    settled = [judged._replace(verdict=Verdict(READY)) for judged in files if judged.header is not None]
    writing = [judged._replace(verdict=Verdict(SETTLING, "why")) for judged in settled]
    names = {entry.files[0].path: name for name, entry in entries(*settled).items()}
    assert {entry.files[0].path: name for name, entry in entries(*writing).items()} == names


def test_projectors_and_drafts_are_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models lie beside however many projectors and drafts, each of them is looked at a few times."""
    looked = 0
    true = quantization_tag

    def count(*args: str) -> str:
        nonlocal looked
        looked += 1
        return true(*args)

    monkeypatch.setattr("llamavisor.catalog.group.quantization_tag", count)
    snapshot = Snapshot("user/repo", "models--user--repo/snapshots/a")
    names = [f"{kind}{number}-Q4_0.gguf" for kind in ("m", "mmproj", "mtp-") for number in range(100)]
    found = entries(*(file(f"{snapshot.folder}/{name}", None, snapshot=snapshot) for name in names))
    models = [entry for entry in found.values() if entry.files[0].path.rpartition("/")[2].startswith("m")]
    assert len(models) == 100
    assert all(entry.projector and entry.draft for entry in models)
    assert looked < 10 * len(names)
