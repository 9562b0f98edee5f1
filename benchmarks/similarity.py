"""What comparing all pairs of a zoo costs, against bounds and rivals measured in the same run.

    COMPOSER_ZOO=DIR python benchmarks/similarity.py [PART ...]

Parts: speed, rival, growth, memory; all by default. DIR holds SmolLM2-135M-Instruct and five fine-tunes of it as
Hugging Face directories (smollm2-135m-instruct, smol-sst2, …); without it, random models of the same shapes are made.
Prints one JSON object a part. Times are medians, ours and theirs in turn, each in a process of its own.

- speed: our pass over six models, against reading and upcasting every tensor once (safetensors, `.float()`), and
  against the same in blocks of rows with reused memory, the tightest bound.
- rival: against comparing pair by pair, each time loading both models, by the mean cosine of input columns of
  attention and MLP matrices (Model-GLUE, arXiv 2410.05357, and its released code); ours by the same measure.
- growth: seconds per model from 2 to 12 models.
- memory: peak over the interpreter's base, for six models and for six with four times the layers.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from composer.artefacts import Store
from composer.similarity import SignalSection, compare
from composer.zoo import Checkpoint, SafetensorsWeights, Zoo, inspect_checkpoint, read_blocks

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("smollm2-135m-instruct", "smol-sst2", "smol-agnews", "smol-science", "smol-math", "smol-code")
HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 576, 1536, 192, 49152, 30
ROUNDS = 3


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a SmolLM2-135M with any number of layers."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            found[f"{place}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        found |= {f"{place}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[f"{place}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{place}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint with the description of the quickstart's base; only its tensors matter here."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).symlink_to(ROOT / "recipes" / "quickstart" / "models" / "stories" / name)
    save_file(tensors, directory / "model.safetensors")
    return directory


def made(directory: Path, count: int, layers: int = LAYERS, noise: float = 0.003) -> list[Path]:
    """Make a random base and copies of it with noise, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(layers).items()}
    paths = []
    for number in range(count):
        copy = {
            name: (tensor + noise * (number > 0) * 0.02 * torch.randn(tensor.shape, generator=generator)).bfloat16()
            for name, tensor in base.items()
        }
        paths.append(write(directory / f"m{number}", copy))
    return paths


def real(directory: Path) -> list[Path]:
    """Return the six real models, or six made ones where there are none."""
    zoo = os.environ.get("COMPOSER_ZOO")
    return [Path(zoo) / name for name in NAMES] if zoo else made(directory / "six", 6)


def described(paths: list[Path], store: Store) -> list[Checkpoint]:
    """Describe models, which also brings their files into the page cache."""
    return [inspect_checkpoint(path.name, path, store) for path in paths]


def ours(models: list[Checkpoint], **signal: object) -> float:
    """Return the seconds that comparing all pairs takes, with nothing known before."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        compare(Zoo(members=tuple(models)), Store(Path(directory)), SignalSection(**signal))  # type: ignore[arg-type]
        return time.perf_counter() - began


def read_and_upcast(models: list[Checkpoint]) -> float:
    """Read and upcast every tensor once, as one would write it."""
    began = time.perf_counter()
    for model in models:
        with safe_open(Path(model.path) / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name).float()
    return time.perf_counter() - began


def read_and_upcast_in_blocks(models: list[Checkpoint]) -> float:
    """Read and upcast every tensor once in blocks of rows, into the same memory."""
    began = time.perf_counter()
    buffer = torch.empty(1 << 21)
    for model in models:
        weights = SafetensorsWeights(Path(model.path))
        for name in weights.headers:
            for block in read_blocks(weights, name, 1 << 20):
                buffer[: block.numel()].copy_(block.reshape(-1))
    return time.perf_counter() - began


def pair_by_pair(models: list[Checkpoint], *, mapped: bool) -> float:
    """Compare pair by pair, loading both models each time: cosines along dim 0, averaged over columns and tensors.

    In float32, since cosines of fine-tunes drown in bfloat16. Both state dicts are loaded whole, as the released code
    does; `mapped` lets the files be mapped instead, so that only what is compared is read: the best this way can do.
    """
    began = time.perf_counter()
    for first, second in combinations(models, 2):
        files = [Path(one.path) / "model.safetensors" for one in (first, second)]
        a, b = (load_file(file) if mapped else load(file.read_bytes()) for file in files)
        cosines = [
            torch.nn.functional.cosine_similarity(a[name].float(), b[name].float(), dim=0).mean()
            for name in a
            if "self_attn" in name or "mlp" in name
        ]
        torch.stack(cosines).mean()
    return time.perf_counter() - began


TIMED = {
    "ours": ours,
    "ours_by_column": lambda models: ours(models, per_column=True),
    "read_and_upcast": read_and_upcast,
    "in_blocks": read_and_upcast_in_blocks,
    "pair_by_pair": lambda models: pair_by_pair(models, mapped=False),
    "pair_by_pair_mapped": lambda models: pair_by_pair(models, mapped=True),
}


def timed(names: list[str], paths: list[Path]) -> dict[str, float]:
    """Return the median seconds of each, in turn over several rounds.

    Each run has a process of its own, which warms up first: how fast memory comes depends on what ran before.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            command = [sys.executable, __file__, "--time", name, *map(str, paths)]
            times[name].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {name: statistics.median(values) for name, values in times.items()}


def one_time(name: str, paths: list[Path]) -> float:
    """Return the median seconds of one function in this process, after a run that does not count."""
    with tempfile.TemporaryDirectory() as directory:
        models = described(paths, Store(Path(directory)))
        return statistics.median([TIMED[name](models) for _ in range(4)][1:])


def speed(directory: Path) -> dict[str, float]:
    """Measure our pass against its bounds."""
    times = timed(["ours", "read_and_upcast", "in_blocks"], real(directory))
    return {
        **times,
        "ratio": times["ours"] / times["read_and_upcast"],
        "ratio_to_blocks": times["ours"] / times["in_blocks"],
    }


def rival(directory: Path) -> dict[str, float]:
    """Measure against comparing pair by pair."""
    times = timed(["ours", "ours_by_column", "pair_by_pair", "pair_by_pair_mapped"], real(directory))
    ratios = {
        f"{theirs}_over_{mine}": times[theirs] / times[mine]
        for theirs in ("pair_by_pair", "pair_by_pair_mapped")
        for mine in ("ours", "ours_by_column")
    }
    return {**times, **ratios}


def growth(directory: Path) -> dict[str, float]:
    """Measure seconds per model as the zoo grows."""
    paths = made(directory / "twelve", 12)
    each = {f"s_per_model_{count}": timed(["ours"], paths[:count])["ours"] / count for count in (2, 4, 6, 8, 12)}
    return {**each, "ratio_12_to_2": each["s_per_model_12"] / each["s_per_model_2"]}


def memory(directory: Path) -> dict[str, float]:
    """Measure the peak in processes of their own."""
    found = {}
    for label, paths in (("six", real(directory)), ("four_times_the_layers", made(directory / "deep", 6, 4 * LAYERS))):
        command = [sys.executable, __file__, "--peak", *map(str, paths)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{label}_mb"] = float(answer.stdout)
    return {**found, "ratio": found["four_times_the_layers_mb"] / found["six_mb"]}


def peak(paths: list[Path]) -> float:
    """Return the megabytes that a comparison needs at most, over those of the interpreter with its imports."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        quickstart = ROOT / "recipes" / "quickstart" / "models"
        compare(Zoo(members=tuple(described([quickstart / "stories", quickstart / "stories-web"], store))), store)
        models = described(paths, store)
        base = psutil.Process().memory_info().rss
        compare(Zoo(members=tuple(models)), store)
        # Linux's own high-water mark: that of getrusage begins at the parent's.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024 - base / (1 << 20)  # type: ignore[index]


PARTS = {"speed": speed, "rival": rival, "growth": growth, "memory": memory}


def main() -> None:
    """Run the parts asked for."""
    if sys.argv[1:2] == ["--peak"]:
        print(peak([Path(path) for path in sys.argv[2:]]))
        return
    if sys.argv[1:2] == ["--time"]:
        print(one_time(sys.argv[2], [Path(path) for path in sys.argv[3:]]))
        return
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    for part in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            figures = PARTS[part](Path(directory))
        rounded = {name: round(value, 3) for name, value in figures.items()}
        print(json.dumps({"part": part, "threads": torch.get_num_threads(), **rounded}), flush=True)


if __name__ == "__main__":
    main()
