"""Models on a hub: only the files needed, headers alone for a description, and one clear line where it fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.conftest import MODELS, Cli
from tests.hub import Hub
from tests.test_adapters import KINDS, make_adapter
from tests.test_gguf import write_gguf

WEIGHTS = (MODELS / "stories" / "model.safetensors").stat().st_size
RECIPE = """
name: hub
zoo:
  models:
{models}
evaluate: {{tasks: [arc_easy]}}
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def ask(hub: Hub, cli: Cli, tmp_path: Path) -> Cli:
    """The command line, with the stand-in for its hub."""
    environment = hub.environment(tmp_path / "hf")
    return lambda *arguments, **more: cli(*arguments, **{**environment, **more})


def recipe(tmp_path: Path, *models: str) -> str:
    path = tmp_path / "hub.yaml"
    path.write_text(RECIPE.format(models="\n".join(f"    - {{{one}}}" for one in models)))
    return str(path)


def fetched(hub: Hub) -> set[str]:
    return {one.path.rsplit("/", 1)[-1] for one in hub.requests if one.method == "GET" and "/resolve/" in one.path}


def test_only_the_files_needed_are_downloaded_and_only_once(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    source = Path(shutil.copytree(MODELS / "stories", tmp_path / "source"))
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "model.gguf"):
        (source / extra).write_bytes(b"not wanted")
    hub.add("org/stories", source)
    hub.add("org/math", MODELS / "stories-math")
    path = recipe(tmp_path, "id: plain, model: org/stories", "id: math, model: org/math, revision: main")
    before = ask("plan", path)
    assert before.returncode == 0, before.stderr
    assert "not here yet: org/stories, 9" in before.stdout
    whole = [one for one in hub.requests if "safetensors" in one.path and one.status == 200 and one.sent > 400_000]
    assert not whole, "a plan reads headers, and downloads no weights"
    result = ask("cluster", path, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["clusters"][0]["members"] == ["plain", "math"]
    assert fetched(hub) >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not fetched(hub) & {"pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "model.gguf"}
    hub.requests.clear()
    assert ask("cluster", path).returncode == 0
    assert fetched(hub) == set()
    hub.stop()
    again = ask("cluster", path)
    assert again.returncode == 0, "what is here needs no hub"
    assert ask("cluster", path, HF_HUB_OFFLINE="1").returncode == 0


def test_a_description_reads_headers_alone(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    hub.add("org/stories", write_checkpoint(tmp_path / "m", load_file(MODELS / "stories/model.safetensors"), shards=3))
    result = ask("inspect", "org/stories", "--json")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["models"]
    assert found["files"] == 3
    local = json.loads(ask("inspect", str(tmp_path / "m"), "--json").stdout)["models"][0]
    for key in ("architecture", "parameters", "shapes_hash", "tokenizer", "settings", "size_bytes", "tied_head"):
        assert found[key] == local[key]
    assert not any(one.status == 200 and "safetensors" in one.path and one.sent > 400_000 for one in hub.requests)


def test_revisions_adapters_and_gguf_files(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    hub.add("org/stories", MODELS / "stories")
    hub.add("org/stories", MODELS / "stories-math", revision="math")
    make_adapter(tmp_path / "adapter", **KINDS["plain"])
    hub.add("org/adapter", tmp_path / "adapter")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "a.gguf")
    write_gguf(tmp_path / "gguf" / "b.gguf", "Q4_1")
    hub.add("org/gguf", tmp_path / "gguf")
    path = recipe(
        tmp_path,
        "id: plain, model: org/stories",
        "id: math, model: org/stories@math",
        "id: tuned, model: org/stories, adapter: org/adapter",
        "id: small, model: org/gguf, file: b.gguf",
    )
    result = ask("cluster", path, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)["similarity"]["values"]
    assert all(0.9 < values[0][other] < 1 for other in (1, 2, 3))
    assert "a.gguf" not in fetched(hub)
    for arguments, expected in (
        (["org/gguf"], "--file for a GGUF file"),
        (["org/adapter"], "an adapter, described with its base"),
    ):
        result = ask("inspect", *arguments)
        assert result.returncode == 3
        assert expected in result.stderr
    assert "LlamaForCausalLM" in ask("inspect", "org/gguf", "--file", "b.gguf").stdout
    assert "org/adapter" not in ask("inspect", "org/stories", "--adapter", "org/adapter").stderr
    result = ask("cluster", recipe(tmp_path, "id: small, model: org/gguf"))
    assert result.returncode == 3
    assert "holds several GGUF files; name one with file: (a.gguf, b.gguf)" in result.stderr


def test_what_the_hub_refuses_is_one_line(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    hub.add("org/stories", MODELS / "stories")
    hub.add("org/gated", MODELS / "stories", gated=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add("org/empty", tmp_path / "empty")
    for model, expected in (
        ("org/absent", "no such repository on the hub"),
        ("org/stories@absent", "the repository has no revision 'absent'"),
        ("org/gated", "access to this repository has to be granted"),
        ("org/empty", "no safetensors or GGUF weights in this repository"),
    ):
        result = ask("cluster", recipe(tmp_path, f"id: one, model: {model}"))
        assert result.returncode == 3, (model, result.stderr)
        (line,) = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
        assert f"model 'one': {model}" in line
        assert expected in line
    assert ask("cluster", recipe(tmp_path, "id: one, model: org/gated"), **{"HF_TOKEN": "let-me-in"}).returncode == 0


def test_a_hub_that_cannot_be_reached(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    hub.add("org/stories", MODELS / "stories")
    hub.stop()
    path = recipe(tmp_path, "id: one, model: org/stories", f"id: two, model: {MODELS / 'stories'}")
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        for arguments in (("cluster", path), ("inspect", "org/stories"), ("plan", path)):
            result = ask(*arguments, **more)
            assert result.returncode == 3, result.stderr
            assert "org/stories: there is no such directory here" in result.stderr
            assert "cannot be reached" in result.stderr
            assert "Traceback" not in result.stderr
    skipped = ask("cluster", path, "zoo.on_error=skip")
    assert skipped.returncode == 0
    assert "skipped: one:" in skipped.stdout


def test_a_download_that_breaks_off_is_taken_up_again(hub: Hub, ask: Cli, tmp_path: Path) -> None:
    import torch

    big = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1024, 1024) for i in range(6)}
    hub.add("org/big", write_checkpoint(tmp_path / "big", big))
    hub.fail_after = 15 << 20
    result = ask("cluster", recipe(tmp_path, "id: one, model: org/big"), timeout=120)
    assert result.returncode == 0, result.stderr
    parts = [one for one in hub.requests if one.method == "GET" and one.path.endswith("model.safetensors")]
    assert len(parts) == 2
    assert parts[1].status == 206
    assert sum(one.sent for one in parts) < 1.5 * (tmp_path / "big" / "model.safetensors").stat().st_size
