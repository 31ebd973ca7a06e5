"""The Hub of our own, held against the Hub's own client: what that understands is what we may rely on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, errors

from fakes.hub_server import HubFile, HubServer, Repository

CONTENT = bytes(range(256)) * 1000
FILES = {"a.gguf": HubFile(CONTENT), "sub/b.gguf": HubFile(CONTENT[:-1]), "README.md": HubFile(b"# hi", is_lfs=False)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with an open, a private and a gated repository."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # else its progress bars leave a thread behind
    repositories = {
        "user/open": Repository(FILES, revisions=("v1",)),
        "user/private": Repository(FILES, is_private=True),
        "user/gated": Repository(FILES, gated_to=("hf_good",)),
    }
    with HubServer(repositories, tokens=["hf_good", "hf_other"], page=2) as hub:
        yield hub
        huggingface_hub.close_session()


def test_what_a_repository_holds(server: HubServer) -> None:
    """The client reads commit, names, sizes and hashes from it, by its info and page by page by its tree."""
    api = HfApi(endpoint=server.url, token=False)
    info = api.model_info("user/open", revision="v1", files_metadata=True)
    assert info.sha == "a" * 40
    assert {each.rfilename: each.size for each in info.siblings or ()} == {
        path: file.length for path, file in FILES.items()
    }
    tree = {each.path: each for each in api.list_repo_tree("user/open", recursive=True)}
    assert tree["sub/b.gguf"].lfs.sha256 == FILES["sub/b.gguf"].oid
    assert tree["README.md"].lfs is None
    assert len([asked for asked in server.asked if "/tree/" in asked.path]) == 2


def test_the_client_downloads_from_it(server: HubServer, tmp_path: Path) -> None:
    """The client fetches files of the store, which refuses a token, and files of git."""
    for path, file in FILES.items():
        got = huggingface_hub.hf_hub_download(
            "user/open", path, endpoint=server.url, token="hf_good", local_dir=tmp_path
        )
        assert Path(got).read_bytes() == file.content


@pytest.mark.parametrize(
    ("repository", "revision", "token", "kind"),
    [
        ("user/none", "main", False, errors.RepositoryNotFoundError),
        ("user/none", "main", "hf_good", errors.RepositoryNotFoundError),
        ("user/private", "main", False, errors.RepositoryNotFoundError),
        ("user/open", "v2", False, errors.RevisionNotFoundError),
        ("user/open", "main", "hf_bad", errors.HfHubHTTPError),
    ],
)
def test_what_it_refuses(
    server: HubServer, repository: str, revision: str, token: str | bool, kind: type[Exception]
) -> None:
    """The client knows its refusals for what they are."""
    with pytest.raises(kind):
        HfApi(endpoint=server.url, token=token).model_info(repository, revision=revision)


@pytest.mark.parametrize("token", [False, "hf_other"])
def test_a_gated_file(server: HubServer, token: str | bool) -> None:
    """What a gated repository holds is told to everybody; its files are not."""
    HfApi(endpoint=server.url, token=token).model_info("user/gated")
    url = huggingface_hub.hf_hub_url("user/gated", "a.gguf", endpoint=server.url)
    with pytest.raises(errors.GatedRepoError):
        huggingface_hub.get_hf_file_metadata(url, token=token)
