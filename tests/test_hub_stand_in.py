"""The stand-in for the hub, as the unmodified client sees it from a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MODELS
from tests.hub import STRANGER, Hub

STORIES = MODELS / "stories"
WEIGHTS = "model.safetensors"
SHA256 = hashlib.sha256((STORIES / WEIGHTS).read_bytes()).hexdigest()
SIZE = (STORIES / WEIGHTS).stat().st_size
MEBIBYTE = 1 << 20
MEMBER = "hf_member"

PROGRAM = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
try:
    answer = eval(sys.argv[1])
except Exception as error:
    answer = type(error).__name__
print(json.dumps(answer))
"""

Client = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("tiny/stories", STORIES)
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """Evaluate an expression with the client, and return its value or the name of its error."""

    def run(expression: str, **environment: str) -> Any:
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, expression],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **hub.environment(tmp_path / "home"), **environment},
            cwd=tmp_path,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    return run


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_describes_a_repository(hub: Hub, client: Client) -> None:
    info, tree = client(
        "(lambda one: [one.sha, one.gated, {s.rfilename: [s.size, s.lfs] for s in one.siblings}])"
        "(HfApi().model_info('tiny/stories', revision='main', files_metadata=True)),"
        "{f.path: [f.size, f.lfs] for f in HfApi().list_repo_tree('tiny/stories', recursive=True)}"
    )
    commit, gated, files = info
    assert len(commit) == 40
    assert gated is False
    assert files == tree
    assert {name: size for name, (size, _) in files.items()} == {p.name: p.stat().st_size for p in STORIES.iterdir()}
    lfs = {name: lfs for name, (_, lfs) in files.items() if lfs}
    assert lfs == {WEIGHTS: {"size": SIZE, "sha256": SHA256, "pointer_size": 131}}


def test_lists_directories_like_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    for name in ("a.txt", "original/b.txt", "original/deep/c.txt"):
        path = tmp_path / "nested" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    hub.add("nested", tmp_path / "nested")
    calls = ["recursive=True", "recursive=False", "path_in_repo='original/deep'"]
    everything, top, deep = client(
        ",".join(f"sorted(f.path for f in HfApi().list_repo_tree('nested', {arguments}))" for arguments in calls)
    )
    assert everything == ["a.txt", "original", "original/b.txt", "original/deep", "original/deep/c.txt"]
    assert top == ["a.txt", "original"]
    assert deep == ["original/deep/c.txt"]


def test_a_snapshot_has_the_files_that_were_asked_for(hub: Hub, client: Client, tmp_path: Path) -> None:
    call = f"snapshot_download('tiny/stories', allow_patterns=['*.json', '*.safetensors'], cache_dir={str(tmp_path)!r})"
    path = Path(client(call))
    assert tmp_path in path.parents
    assert {one.name for one in path.iterdir()} == {one.name for one in STORIES.iterdir()} - {"README.md"}
    assert all(same(one, STORIES / one.name) for one in path.iterdir())
    assert sum(one.sent for one in hub.requests if "/resolve/" in one.path) == sum(
        one.stat().st_size for one in path.iterdir()
    )

    before = len(hub.requests)
    assert client(call) == str(path)
    again = [one.path for one in hub.requests[before:]]
    assert again == ["/api/models/tiny/stories/revision/main"], "the rest is in the cache"

    hub.stop()
    assert client(call) == str(path), "an unreachable hub is no obstacle to what is in the cache"
    assert client("snapshot_download('tiny/stories')") == "LocalEntryNotFoundError"
    assert len(hub.requests) == before + 1


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, client: Client, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    (large / WEIGHTS).write_bytes(os.urandom(MEBIBYTE) * 24)
    hub.add("tiny/large", large)
    hub.fail_after = 12 * MEBIBYTE
    path = Path(client(f"hf_hub_download('tiny/large', {WEIGHTS!r})"))
    assert same(path, large / WEIGHTS)
    assert hub.fail_after is None
    first, second = (one for one in hub.requests if one.method == "GET")
    assert (first.status, first.range, first.sent) == (200, None, 12 * MEBIBYTE)
    # The client writes in pieces of ten mebibytes, and has lost what it had of the second.
    assert (second.status, second.range, second.sent) == (206, f"bytes={10 * MEBIBYTE}-", 14 * MEBIBYTE)


def test_reads_the_headers_of_the_weights_alone(hub: Hub, client: Client) -> None:
    names = client("sorted(HfApi().get_safetensors_metadata('tiny/stories').weight_map)")
    assert "model.embed_tokens.weight" in names
    head, get = hub.requests
    assert (head.method, head.status, head.sent) == ("HEAD", 200, 0)
    assert (get.method, get.status, get.range) == ("GET", 206, "bytes=0-100000")
    assert get.sent == 100_001 < SIZE


def test_revisions_are_directories_of_their_own(hub: Hub, client: Client) -> None:
    hub.add("tiny/stories", MODELS / "stories-math", revision="refs/pr/1")
    main, other, by_commit = client(
        "(lambda commit: [hf_hub_download('tiny/stories', 'README.md', revision=one)"
        " for one in ('main', 'refs/pr/1', commit)])(HfApi().model_info('tiny/stories', revision='refs/pr/1').sha)"
    )
    assert same(Path(main), STORIES / "README.md")
    assert same(Path(other), MODELS / "stories-math" / "README.md")
    assert by_commit == other != main


def test_refuses_what_it_does_not_have(hub: Hub, client: Client) -> None:
    calls = {
        "HfApi().model_info('tiny/stories', revision='v9')": "RevisionNotFoundError",
        "snapshot_download('tiny/stories', revision='v9')": "RevisionNotFoundError",
        "HfApi().model_info('tiny/none')": "RepositoryNotFoundError",
        "snapshot_download('tiny/none')": "RepositoryNotFoundError",
        "hf_hub_download('tiny/stories', 'none.json')": "RemoteEntryNotFoundError",
    }
    assert {call: client(call) for call in calls} == calls
    assert {one.status for one in hub.requests} <= {200, 404}


def test_a_gated_repository_asks_for_a_token(hub: Hub, client: Client) -> None:
    hub.add("tiny/gated", STORIES, gated=True)
    call = "snapshot_download('tiny/gated', allow_patterns='config.json')"
    assert client("HfApi().model_info('tiny/gated').gated") == "manual", "what it is, everyone may know"
    assert client(call) == "GatedRepoError"
    assert hub.requests[-1].status == 401
    assert client(call, HF_TOKEN=STRANGER) == "GatedRepoError"
    assert hub.requests[-1].status == 403
    assert same(Path(client(call, HF_TOKEN=MEMBER)) / "config.json", STORIES / "config.json")
