"""How good the predictor's choices are, on models it never saw.

    python benchmarks/simmerge/evaluate.py [PART ...] [--corpora FILE ...] [--table FILE]

Parts: pairs (cross-validated by model over the training zoos), bases (trained on one base, judged on the other), scale
(trained on all training zoos, of at most 15M parameters, judged on merges of the SmolLM2-135M specialists), several
(their triples and quadruples), bandit, curve (by size of the corpus), ablation (by group of features), noise. By
default all. Scores are means over tasks; intervals are 95 % bootstrap intervals over pairs. No choice of anything here
was made on the specialists' table.

Gap closed: (chosen - best fixed arm) / (oracle - best fixed arm). The best fixed arm is the one with the highest mean
over all judged pairs, in hindsight; the oracle is the best arm of each pair, in hindsight, so it takes noise for skill:
`noise` says how much of the gap is left if the oracle chooses on one half of the items and is judged on the other.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from composer.merging.settings import SimMergeSection
from composer.simmerge.bandit import Bandit, context_of
from composer.simmerge.corpus import load_corpus, matrix
from composer.simmerge.features import FEATURES, NAMES
from composer.simmerge.predictor import Prediction, Predictor
from composer.simmerge.training import cross_validate, cross_validate_scale, merges_of, promises_of, train

ROOT = Path(__file__).resolve().parent
LINEAR, ARITHMETIC, SLERP = "linear", "task_arithmetic", "slerp t 0.5"
LINEARS = "always linear (what mergelens 2.0.3 recommends with a base, as a mean of task vectors)"
"""Its rules look at nothing but whether a base is given: compare/strategy.py."""
RESAMPLES = 2000
TRIES = SimMergeSection().tries
PARTS = ("pairs", "bases", "scale", "several", "noise", "bandit", "curve", "ablation")


@dataclass(frozen=True)
class Board:
    """Merges of groups of models by arms, `[groups, arms]`; nan where one was not made."""

    groups: list[tuple[str, ...]]
    arms: list[str]
    score: np.ndarray
    """Mean over tasks, as measured."""
    predicted: np.ndarray
    """The same, as predicted from what the strongest source of each task scores."""
    parent: np.ndarray
    """`[groups]`: what the best single source scores."""
    expected: np.ndarray
    """`[groups]`: what the best single source scores on the items that were known; nan if labels were not."""
    halves: np.ndarray
    """`[2, groups, arms]`: the score on either half of the items."""


def board(rows: pd.DataFrame, gain: np.ndarray, *, arms: list[str] | None = None) -> Board:
    """Lay merges out; `gain` is what is predicted for each row over its strongest source."""
    table = rows.assign(
        predicted=levels(rows) + gain, group=[(z, *sorted(h)) for z, h in zip(rows["zoo"], rows["hashes"], strict=True)]
    )
    table["odd"] = [np.mean(items[1::2]) for items in rows["items"]]
    table["even"] = [np.mean(items[::2]) for items in rows["items"]]
    merges = table.groupby(["group", "arm"], sort=True)
    means = merges[["score", "predicted", "odd", "even"]].mean()
    groups = sorted({key[0] for key in means.index})
    arms = arms or sorted({key[1] for key in means.index})
    grids = {name: np.full((len(groups), len(arms)), np.nan) for name in means}
    for (group, arm), row in means.iterrows():
        if arm in arms:
            for name in means:
                grids[name][groups.index(group), arms.index(arm)] = row[name]
    parent, expected = np.zeros(len(groups)), np.zeros(len(groups))
    for group, part in table.groupby("group"):
        each = part.drop_duplicates("task")
        # Merges of one group name its sources in any order.
        orders = [np.argsort(hashes) for hashes in each["hashes"]]
        measured, known = (
            np.mean([np.array(own)[order] for own, order in zip(each[name], orders, strict=True)], axis=0)
            for name in ("source_scores", "known_scores")
        )
        place = groups.index(group)
        parent[place] = measured.max()
        expected[place] = known.max() if each["labelled"].all() else np.nan
    halves = np.stack([grids["odd"], grids["even"]])
    return Board(groups, arms, grids["score"], grids["predicted"], parent, expected, halves)


def levels(rows: pd.DataFrame) -> np.ndarray:
    """Return what each row's strongest source scores on the items that were known; 0 where labels were not."""
    known = [scores[place] for scores, place in zip(rows["known_scores"], rows["strong"], strict=True)]
    return np.where(rows["labelled"], known, 0.0)


def judge(one: Board) -> dict[str, object]:
    """Return how good the predicted choice of an arm is for each group, beside all baselines."""
    full = ~np.isnan(one.score).any(axis=1)
    score, predicted, parent, expected = one.score[full], one.predicted[full], one.parent[full], one.expected[full]
    rows = np.arange(len(score))
    chosen, oracle = score[rows, predicted.argmax(axis=1)], score.max(axis=1)
    means = score.mean(axis=0)
    fixed = score[:, means.argmax()]
    arithmetic = [place for place, arm in enumerate(one.arms) if arm.startswith(ARITHMETIC)]
    each = {
        "best single parent": parent,
        LINEARS: score[:, one.arms.index(LINEAR)],
        "always slerp (what mergelens 2.0.3 recommends without a base)": score[:, one.arms.index(SLERP)],
        "always task arithmetic (best weight in hindsight)": score[:, max(arithmetic, key=lambda a: means[a])],
        f"best fixed arm in hindsight: {one.arms[means.argmax()]}": fixed,
        "random arm": score.mean(axis=1),
        "predicted": chosen,
        "predicted, or the parent where no gain is predicted": np.where(
            predicted.max(axis=1) > expected, chosen, parent
        ),
        "oracle": oracle,
    }
    draws = np.random.default_rng(0).integers(0, len(score), size=(RESAMPLES, len(score)))

    def interval(value: Callable[[np.ndarray], np.ndarray]) -> list[float]:
        return [round(float(x), 3) for x in (value(rows), *np.nanpercentile([value(d) for d in draws], [2.5, 97.5]))]

    linear = each[LINEARS]
    return {
        "groups": len(score),
        "mean": {name: round(float(values.mean()), 4) for name, values in each.items()},
        "gap_closed": interval(lambda d: (chosen[d] - fixed[d]).mean() / max((oracle[d] - fixed[d]).mean(), 1e-9)),
        "regret_over_linears": interval(
            lambda d: (oracle[d] - chosen[d]).mean() / max((oracle[d] - linear[d]).mean(), 1e-9)
        ),
        "over_linear": interval(lambda d: (chosen[d] - linear[d]).mean()),
        "rank_correlation": round(float(np.mean([_spearman(a, b) for a, b in zip(score, predicted, strict=True)])), 3),
    }


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(pd.Series(first).corr(pd.Series(second), method="spearman"))


def noise(one: Board) -> dict[str, float]:
    """Return what is left of the oracle's lead if it chooses on one half of the items and is judged on the other."""
    full = ~np.isnan(one.score).any(axis=1)
    lead, honest, correlation = [], [], []
    for choose, test in ((0, 1), (1, 0)):
        chosen, tested = one.halves[choose][full], one.halves[test][full]
        fixed = tested[:, chosen.mean(axis=0).argmax()]
        lead.append((tested.max(axis=1) - fixed).mean())
        honest.append((tested[np.arange(len(tested)), chosen.argmax(axis=1)] - fixed).mean())
        correlation.append(np.mean([_spearman(a, b) for a, b in zip(chosen, tested, strict=True)]))
    return {
        "oracle_lead": round(float(np.mean(lead)), 4),
        "honest_lead": round(float(np.mean(honest)), 4),
        "share_that_half_the_items_can_find": round(float(np.mean(honest) / np.mean(lead)), 3),
        "rank_correlation_of_halves": round(float(np.mean(correlation)), 3),
    }


def promises(rows: pd.DataFrame, gain: np.ndarray, scale: np.ndarray, predictor: Predictor) -> dict[str, object]:
    """Return how far what is promised of a merge holds: intervals of its gain over the best single source, refusals."""
    kept = promises_of(rows, gain, scale, predictor.correlation)
    steps = np.linspace(0, 1, len(predictor.mean_errors))
    low, high = (kept.promised + np.interp(one, steps, predictor.mean_errors) * kept.scale for one in (0.1, 0.9))
    chance = 1 - np.interp(-kept.promised / kept.scale, predictor.mean_errors, steps)
    real = kept.real
    found: dict[str, object] = {
        "merges": len(real),
        "interval_coverage": round(float(((low <= real) & (real <= high)).mean()), 3),
        "interval_width": round(float((high - low).mean()), 4),
        "correlation": round(float(np.corrcoef(kept.promised, real)[0, 1]), 3),
        "all_that_lose": round(float((real < 0).mean()), 3),
    }
    for risk in (0.9, 0.5, 0.2):
        refused = chance < 1 - risk
        found[f"risk_{risk}"] = {
            "refused": round(float(refused.mean()), 3),
            "refused_that_lose": round(float((real[refused] < 0).mean()), 3) if refused.any() else None,
            "made_that_gain": round(float((real[~refused] >= 0).mean()), 3) if (~refused).any() else None,
        }
    return found


def coverage(rows: pd.DataFrame, gain: np.ndarray, scale: np.ndarray, predictor: Predictor) -> float:
    """Return the share of rows, one a merge and task, whose gain lies within its 80 % interval."""
    _, low, high = (one[:, 0] for one in predictor.interval(Prediction(gain[:, None], scale[:, None]), 0.8))
    return round(float(((low <= rows["gain"]) & (rows["gain"] <= high)).mean()), 3)


def two(rows: pd.DataFrame, *, labelled: bool = True) -> np.ndarray:
    """Return which rows are merges of two."""
    return (rows["hashes"].map(len) == 2).to_numpy() & (rows["labelled"] == labelled).to_numpy()


def show(part: str, **values: object) -> None:
    """Print a result."""
    print(json.dumps({"part": part, **values}), flush=True)


def pairs(rows: pd.DataFrame, predictor: Predictor) -> None:
    """Judge on pairs of the training zoos, cross-validated by model."""
    gain = cross_validate(rows)
    scale = cross_validate_scale(rows, rows["gain"].to_numpy() - gain)
    known = np.isfinite(gain) & np.isfinite(scale)
    for labelled in (True, False):
        chosen = two(rows, labelled=labelled) & known
        show("pairs", labelled=labelled, **judge(board(rows[chosen], gain[chosen])))
        within = coverage(rows[chosen], gain[chosen], scale[chosen], predictor)
        show("pairs", labelled=labelled, interval_coverage_of_a_task=within)
    chosen = two(rows) & known
    show("pairs", labelled=True, **promises(rows[chosen], gain[chosen], scale[chosen], predictor))
    for zoo in sorted(rows["zoo"].unique()):
        own = chosen & (rows["zoo"] == zoo).to_numpy()
        show("pairs", zoo=zoo, **judge(board(rows[own], gain[own])))
    bandits("training", rows[chosen].reset_index(drop=True), gain[chosen])


def bases(corpus: pd.DataFrame) -> None:
    """Judge on all merges of one base what was trained on those of the others: another size, and other seeds."""
    for base in sorted(corpus["base"].unique()):
        predictor = train(corpus[corpus["base"] != base].reset_index(drop=True))
        test = merges_of(corpus[corpus["base"] == base].reset_index(drop=True))
        test = test[two(test)].reset_index(drop=True)
        prediction = predictor.predict([matrix(test)])
        gain, scale = prediction.gain[:, 0], prediction.scale[:, 0]
        zoos = sorted(test["zoo"].unique())
        show("bases", zoos=zoos, **judge(board(test, gain)))
        show("bases", zoos=zoos, interval_coverage_of_a_task=coverage(test, gain, scale, predictor))
        show("bases", zoos=zoos, **promises(test, gain, scale, predictor))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--corpora", nargs="*", type=Path, default=sorted((ROOT / "corpora").glob("*.parquet")))
    parser.add_argument("--table", type=Path, default=ROOT / "specialists.parquet")
    options = parser.parse_args()
    corpus = load_corpus(options.corpora)
    rows, predictor = merges_of(corpus), train(corpus)
    if "pairs" in options.parts:
        pairs(rows, predictor)
    if "bases" in options.parts:
        bases(corpus)
    if "noise" in options.parts:
        chosen = two(rows)
        show("noise", zoo="training", **noise(board(rows[chosen], np.zeros(chosen.sum()))))
    if {"scale", "several", "noise", "bandit"} & set(options.parts) and options.table.is_file():
        specialists(options, rows, predictor)
    if "curve" in options.parts:
        curve(rows)
    if "ablation" in options.parts:
        ablation(rows)


def specialists(options: argparse.Namespace, rows: pd.DataFrame, predictor: Predictor) -> None:
    """Judge on the specialists what was trained on the training zoos."""
    test = merges_of(load_corpus([options.table]))
    prediction = predictor.predict([matrix(test)])
    gain, scale = prediction.gain[:, 0], prediction.scale[:, 0]
    chosen = two(test)
    if "scale" in options.parts:
        for labelled in (True, False):
            own = two(test, labelled=labelled)
            show("scale", labelled=labelled, **judge(board(test[own], gain[own])))
            within = coverage(test[own], gain[own], scale[own], predictor)
            show("scale", labelled=labelled, interval_coverage_of_a_task=within)
        show("scale", labelled=True, **promises(test[chosen], gain[chosen], scale[chosen], predictor))
    if "noise" in options.parts:
        show("noise", zoo="specialists", **noise(board(test[chosen], gain[chosen])))
    if "several" in options.parts:
        several(test, gain)
    if "bandit" in options.parts:
        bandits("specialists", test[chosen].reset_index(drop=True), gain[chosen])
        newcomer("specialists", rows, test[chosen].reset_index(drop=True))


def several(test: pd.DataFrame, gain: np.ndarray) -> None:
    """Judge the choice among all subsets, orders and ways, by its rank among all.

    Every three, four and all five specialists are a cluster to choose in. Beside the choice: what the strategy does,
    which makes the best three of different operators or subsets and scores them, here on half of the items, judged on
    the other; and the same if all are made and scored, which is as well as these items can tell. By chance it is .5.
    """
    own = test.assign(predicted_gain=gain)[test["labelled"]]
    own["order"] = own["hashes"].map(tuple)
    own["predicted"] = levels(own) + own["predicted_gain"]
    own["odd"], own["even"] = ([np.mean(one[start::2]) for one in own["items"]] for start in (1, 0))
    plans = own.groupby(["order", "arm"])[["score", "predicted", "odd", "even"]].mean().reset_index()
    models = sorted({one for order in plans["order"] for one in order})

    def better(part: pd.DataFrame, made: pd.DataFrame, by: str, judged: str) -> float:
        return float((part[judged] > made.loc[made[by].idxmax(), judged]).mean())

    def by_halves(part: pd.DataFrame, made: pd.DataFrame) -> float:
        return (better(part, made, "odd", "even") + better(part, made, "even", "odd")) / 2

    for size in (3, 4, 5):
        found = []
        for cluster in combinations(models, size):
            part = plans[[set(order) <= set(cluster) for order in plans["order"]]]
            whole = part[[len(order) == min(size, 4) for order in part["order"]]]
            ranked = part.sort_values("predicted", ascending=False)
            chosen = ranked.iloc[0]
            kind = ranked["order"].map(frozenset).astype(str) + ranked["arm"].str.split().str[0]
            subsets = part.groupby(part["order"].map(frozenset))["score"].mean()
            made = ranked[~kind.duplicated()].head(TRIES)
            found.append(
                {
                    "plans": len(part),
                    "score": chosen["score"],
                    "mean": part["score"].mean(),
                    "best": part["score"].max(),
                    "linear_of_all": whole[whole["arm"] == LINEAR]["score"].mean(),
                    "share_that_is_better": better(part, part, "predicted", "score"),
                    "subsets_that_are_better": (subsets > subsets[frozenset(chosen["order"])]).mean(),
                    "of_the_three_made": by_halves(part, made),
                    "of_all_if_made": by_halves(part, part),
                    "rank_correlation": _spearman(part["score"].to_numpy(), part["predicted"].to_numpy()),
                    "rank_correlation_of_halves": _spearman(part["odd"].to_numpy(), part["even"].to_numpy()),
                }
            )
        means = pd.DataFrame(found).mean()
        show("several", models=size, clusters=len(found), **{name: round(float(one), 4) for name, one in means.items()})


@dataclass(frozen=True)
class Offers:
    """What a bandit may choose from: the arms of each group of models."""

    one: Board
    context: np.ndarray
    """`[groups, arms, context]`."""


def offers(rows: pd.DataFrame, gain: np.ndarray) -> Offers:
    """Return the offers of groups for which every arm was made."""
    own = board(rows, gain)
    full = ~np.isnan(own.score).any(axis=1)
    groups = [group for group, whole in zip(own.groups, full, strict=True) if whole]
    contexts = None
    features = matrix(rows)
    keys = list(zip(rows["zoo"], rows["hashes"], rows["arm"], strict=True))
    places: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for place, (zoo, hashes, arm) in enumerate(keys):
        places.setdefault(((zoo, *sorted(hashes)), arm), []).append(place)
    for number, group in enumerate(groups):
        for arm, label in enumerate(own.arms):
            found = context_of([features[place : place + 1] for place in places[group, label]])[0]
            if contexts is None:
                contexts = np.zeros((len(groups), len(own.arms), len(found)))
            contexts[number, arm] = found
    parts = (own.score, own.predicted, own.parent, own.expected)
    whole = Board(groups, own.arms, *(part[full] for part in parts), own.halves[:, full])
    return Offers(whole, contexts if contexts is not None else np.zeros((0, 0, 0)))


def play(offered: Offers, turns: int, seed: int, policy: str, *, start: bool) -> tuple[np.ndarray, Bandit]:
    """Return the regret of each turn: a group comes by chance, an arm is chosen, its score is what is learnt from."""
    generator = np.random.default_rng(seed)
    bandit, regret, one = Bandit(), np.zeros(turns), offered.one
    for turn in range(turns):
        group = int(generator.integers(len(one.groups)))
        score, parent = one.score[group], one.parent[group]
        predicted = one.predicted[group] - one.expected[group] if start else np.zeros(len(one.arms))
        if policy == "uniform":
            place = int(generator.integers(len(one.arms)))
        else:
            own = offered.context[group]
            place = bandit.choose(one.arms, own, predicted, policy=policy, seed=seed * 1000 + turn)  # type: ignore[arg-type]
            bandit = bandit.learnt(
                one.arms[place], offered.context[group, place], float(predicted[place]), float(score[place] - parent)
            )
        regret[turn] = score.max() - score[place]
    return regret, bandit


def bandits(name: str, rows: pd.DataFrame, gain: np.ndarray, turns: int = 100, seeds: int = 20) -> None:
    """Show the cumulative regret of 100 merges, with and without the predictor to begin with.

    Beside it what never changes: the way that is best in hindsight, which no bandit over ways alone can go below.
    """
    offered = offers(rows, gain)
    score = offered.one.score
    lost = score.max(axis=1, keepdims=True) - score
    uniform = lost.mean()
    fixed = lost[:, score.mean(axis=0).argmax()].mean()
    show("bandit", zoo=name, policy="best fixed way in hindsight", of_uniform=round(float(fixed / uniform), 3))
    for policy, start in (("uniform", False), *((p, s) for p in ("linucb", "thompson") for s in (False, True))):
        regret = np.array([play(offered, turns, seed, policy, start=start)[0] for seed in range(seeds)])
        total = regret.sum(axis=1)
        show(
            "bandit",
            zoo=name,
            policy=policy,
            from_predictor=start,
            turns=turns,
            of_uniform=round(float(regret.mean() / uniform), 3),
            regret=round(float(total.mean()), 3),
            interval=[round(float(x), 3) for x in np.percentile(total, [2.5, 97.5])],
            first_20=round(float(regret[:, :20].mean()), 4),
            last_20=round(float(regret[:, -20:].mean()), 4),
        )


def newcomer(name: str, rows: pd.DataFrame, test: pd.DataFrame) -> None:
    """Show how soon a bandit uses an operator as well as a predictor that was trained on it."""
    for operator in ("ties", "task_arithmetic", "della"):
        with_it = train_gain(rows, test)
        without = train_gain(rows[rows["operator"] != operator], test)
        full, blind = offers(test, with_it), offers(test, without)
        one = full.one
        groups = np.arange(len(one.groups))
        chance = one.score.mean()
        skill = one.score[groups, one.predicted.argmax(axis=1)].mean() - chance
        found = {}
        for turns in (0, 10, 30):
            values = []
            for seed in range(10):
                _, bandit = play(blind, turns, seed, "linucb", start=True)
                chosen = [
                    bandit.choose(
                        one.arms, blind.context[g], blind.one.predicted[g] - blind.one.expected[g], exploration=0.0
                    )
                    for g in groups
                ]
                values.append(one.score[groups, chosen].mean() - chance)
            found[turns] = round(float(np.mean(values) / skill), 3)
        show("newcomer", zoo=name, operator=operator, share_of_offline_skill_after=found)


def train_gain(rows: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    """Return what a predictor trained on some merges says of others."""
    gain: np.ndarray = train(rows).predict([matrix(test)]).gain[:, 0]
    return gain


def curve(rows: pd.DataFrame) -> None:
    """Show how the choice gets better with the size of the corpus: less is learnt from, and all pairs are judged."""
    keys = rows["hashes"].map(lambda one: tuple(sorted(one))).astype(str)
    every = np.array(sorted(keys.unique()))
    for share in (0.25, 0.5, 0.75, 1.0):
        found = []
        for seed in range(5 if share < 1 else 1):
            kept = set(np.random.default_rng(seed).permutation(every)[: int(share * len(every))])
            gain = cross_validate(rows, only=keys.isin(kept).to_numpy())
            chosen = two(rows) & np.isfinite(gain)
            found.append(judge(board(rows[chosen], gain[chosen])))
        gaps = [one["gap_closed"][0] for one in found]  # type: ignore[index]
        show("curve", share=share, gap_closed=gaps, rank_correlation=[one["rank_correlation"] for one in found])


def ablation(rows: pd.DataFrame) -> None:
    """Show what each group of features is worth."""
    for group in sorted({one.group for one in FEATURES.values()}):
        without = rows.copy()
        for name in NAMES:
            if FEATURES[name].group == group:
                without["f_" + name] = np.nan
        gain = cross_validate(without)
        chosen = two(without) & np.isfinite(gain)
        found = judge(board(without[chosen], gain[chosen]))
        show("ablation", without=group, gap_closed=found["gap_closed"], rank_correlation=found["rank_correlation"])


if __name__ == "__main__":
    main()
