"""What choosing costs, beside what is chosen from.

    COMPOSER_DATA=DIR python benchmarks/simmerge/cost.py RECIPE [--models 8] [--trials 20]

RECIPE is one that make_recipe.py wrote. Everything starts from an empty store: the models of one cluster are observed
and their merges weighed, then some of these merges are made and scored on the proxy items. Then a made-up zoo of 40
models is planned for, which shows how the search grows with the number of models.
"""

import argparse
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from composer.artefacts import Store
from composer.cli import _quiet_libraries
from composer.evaluation.answers import AnswerTable
from composer.evaluation.tasks import split_of
from composer.merging.judge import Bench, Judge
from composer.recipe import load_recipe
from composer.simmerge.advisor import Advisor
from composer.simmerge.arms import ARMS, arms_of
from composer.simmerge.collect import candidate
from composer.simmerge.footprint import Sample
from composer.simmerge.planner import Planner
from composer.simmerge.predictor import Predictor
from composer.simmerge.signals import BANDS, Manners, Signals
from composer.zoo import inspect_checkpoint

TASKS, ITEMS, CHOICES = 5, 32, 4


def of_cluster(recipe_path: Path, count: int, trials: int) -> dict[str, object]:
    """Return what it costs to choose for some models, and to make and score what is chosen from."""
    recipe = load_recipe(recipe_path)
    split = split_of(recipe.evaluate, "proxy")
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home))
        entries = recipe.zoo.models[:count]
        models = [inspect_checkpoint(str(one.id), Path(one.model), store) for one in entries]
        base = inspect_checkpoint("base", Path(str(recipe.zoo.base)), store) if recipe.zoo.base else None
        began = time.perf_counter()
        advice = Advisor(base, split, recipe.probes, recipe.merge, store).advise(models)
        choosing = time.perf_counter() - began
        judge = Judge(recipe.evaluate, recipe.probes, store.root, {"proxy": split})
        bench = Bench(base=base, dtype=recipe.merge.dtype)
        ids = [one.id for one in models]
        arms = [arm for own in ARMS.values() for arm in own]
        pairs = list(combinations(range(count), 2))
        dice = np.random.default_rng(0)
        spent = []
        for _ in range(trials):
            pair, arm = pairs[dice.integers(len(pairs))], arms[dice.integers(len(arms))]
            one = candidate(ids, pair, arm)
            began = time.perf_counter()
            judge.trial(one.step, [models[place] for place in one.sources], bench, None)
            spent.append(time.perf_counter() - began)
        each = float(np.mean(spent[1:]))  # the first one builds the model
        made = len(pairs) * len(arms)
        return {
            "models": count,
            "weighed": advice.weighed,
            "choosing_s": round(choosing, 1),
            "trial_s": round(each, 2),
            "of_all_pairs": round(choosing / (made * each), 4),
            "of_all_weighed": round(choosing / (advice.weighed * each), 4),
        }


def of_search(count: int) -> dict[str, object]:
    """Return what it costs to weigh the merges of many models that have been observed."""
    dice = np.random.default_rng(0)

    def gram() -> np.ndarray:
        vectors = dice.normal(size=(count, 60))
        found: np.ndarray = vectors @ vectors.T
        return found

    def manners() -> Manners:
        shares = (dice.uniform(0.5, 1, (count, count)) for _ in range(2))
        return Manners(gram(), *shares, dice.normal(size=count))

    answers = {
        f"task-{number}": AnswerTable(
            dice.normal(size=(count + 1, ITEMS, CHOICES)),
            np.ones((ITEMS, CHOICES)),
            np.eye(CHOICES)[dice.integers(0, CHOICES, ITEMS)],
        )
        for number in range(TASKS)
    }
    signals = Signals(
        ids=tuple(f"model-{number}" for number in range(count)),
        based=True,
        weights=np.stack([gram() for _ in BANDS]),
        size=100.0,
        signs=dice.uniform(0.4, 0.6, (count, count)),
        energy=dice.uniform(0, 1, count),
        overlap=dice.uniform(0, 1, (count, count)),
        plain=manners(),
        tasks={name: manners() for name in answers},
        answers=answers,
    )
    base = tuple(torch.randn(57, 576) for _ in range(6))
    sample = Sample(tuple(tuple(one + 0.01 * torch.randn(57, 576) for one in base) for _ in range(count)), base)
    planner = Planner(signals, sample, Predictor.unpack(), tuple(answers))
    began = time.perf_counter()
    planner.search(arms_of(list(ARMS)))
    return {"models": count, "weighed": planner.weighed, "search_s": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    _quiet_libraries()
    print(json.dumps(of_cluster(options.recipe, options.models, options.trials)))
    for count in (10, 20, 40):
        print(json.dumps(of_search(count)))


if __name__ == "__main__":
    main()
