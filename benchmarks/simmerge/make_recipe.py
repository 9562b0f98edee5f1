"""Write the recipe that `model-composer simmerge collect` takes for a zoo made by make_zoo.py.

python benchmarks/simmerge/make_recipe.py --base CHECKPOINT --zoo DIR --name NAME > NAME.yaml
"""

import argparse
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent
OPERATORS = (
    "linear", "slerp", "task_arithmetic", "ties", "dare_ties", "dare_linear", "della", "breadcrumbs", "model_stock",
    "sce", "ram", "arcee_fusion",
)  # fmt: skip


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--items", type=int, default=90, help="proxy items a task, a third of them for features")
    parser.add_argument("--dtype", default="bfloat16", help="what models are computed in")
    options = parser.parse_args()
    models = sorted(path for path in options.zoo.iterdir() if (path / "config.json").is_file())
    tasks = sorted(path.stem for path in (ROOT / "tasks").glob("*.yaml"))
    recipe = {
        "name": options.name,
        "zoo": {
            "base": str(options.base.resolve()),
            "models": [{"id": path.name, "model": str(path.resolve())} for path in models],
        },
        "merge": {"operators": list(OPERATORS), "dtype": "float16"},
        "mixture": {"level": "model", "router": {"kind": "prompt"}},
        "evaluate": {
            "include": str(ROOT / "tasks"), "tasks": tasks, "proxy": 0.9, "proxy_limit": options.items,
            "batch_size": 32, "dtype": options.dtype,
        },
    }  # fmt: skip
    YAML().dump(recipe, sys.stdout)


if __name__ == "__main__":
    main()
