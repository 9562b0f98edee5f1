"""Merging: the arithmetic, the checks, and strategies that keep what pays."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.artefacts import Store
from composer.clustering import Cluster
from composer.errors import DiskFullError, MergeError
from composer.evaluation.scores import Scores, TaskScore
from composer.merging.merge import merge_cluster
from composer.merging.mergekit_backend import make_merge
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergePlan, MergeStep
from composer.merging.smoke import smoke_check
from composer.merging.strategies import STRATEGIES
from composer.merging.workbench import Workbench
from composer.zoo import Checkpoint, Zoo, inspect_checkpoint

MEMBERS = ("stories-math", "stories-science", "stories-web")


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(Path(checkpoint.path) / "model.safetensors").items()}


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to one rounding to bfloat16."""
    return torch.allclose(first, second, rtol=2**-7, atol=1e-6)


def step(operator: str, *inputs: str, **parameters: float | bool | list[float]) -> MergeStep:
    return MergeStep(name=f"by-{operator}", operator=operator, inputs=inputs, parameters=parameters)


def test_linear_is_the_weighted_mean(quick: dict[str, Checkpoint], store: Store) -> None:
    inputs = [quick[name] for name in MEMBERS]
    merged = make_merge(step("linear", *MEMBERS, weight=[1.0, 2.0, 1.0]), inputs, None, store)
    parts = [weights(one) for one in inputs]
    for name, tensor in weights(merged).items():
        assert close(tensor, (parts[0][name] + 2 * parts[1][name] + parts[2][name]) / 4), name


def test_task_arithmetic_is_base_plus_task_vectors(quick: dict[str, Checkpoint], store: Store) -> None:
    inputs, base = [quick[name] for name in MEMBERS], quick["stories"]
    merged = make_merge(step("task_arithmetic", *MEMBERS, weight=0.4), inputs, base, store)
    start, parts = weights(base), [weights(one) for one in inputs]
    for name, tensor in weights(merged).items():
        assert close(tensor, start[name] + 0.4 * sum(part[name] - start[name] for part in parts)), name


@pytest.mark.parametrize("operator", OPERATORS.names())
def test_every_operator_makes_a_working_model(operator: str, quick: dict[str, Checkpoint], store: Store) -> None:
    most = OPERATORS.get(operator).most or 3
    names = MEMBERS[:most]
    inputs = [quick[name] for name in names]
    merged = make_merge(step(operator, *names), inputs, quick["stories"], store, seed=1)
    assert smoke_check(merged, inputs) is None
    assert merged.dtype == "BF16"
    assert merged.lineage is not None
    assert merged.lineage.input_hashes == tuple(one.content_hash for one in inputs)


def test_the_same_merge_is_the_same_artefact_bit_for_bit(quick: dict[str, Checkpoint], tmp_path: Path) -> None:
    inputs = [quick[name] for name in MEMBERS]
    hashes = {
        make_merge(step("dare_ties", *MEMBERS), inputs, quick["stories"], Store(tmp_path / place), seed=7).content_hash
        for place in ("one", "two")
    }
    assert len(hashes) == 1


def test_paths_that_mergekit_would_misread(quick: dict[str, Checkpoint], tmp_path: Path, store: Store) -> None:
    odd = shutil.copytree(quick["stories-math"].path, tmp_path / "a+b@c")
    inputs = [inspect_checkpoint("odd", Path(odd), store), quick["stories-web"]]
    merged = make_merge(step("linear", "odd", "stories-web"), inputs, None, store)
    plain = make_merge(step("linear", "m", "w"), [quick["stories-math"], quick["stories-web"]], None, store)
    assert all(torch.equal(weights(merged)[name], tensor) for name, tensor in weights(plain).items())


def test_wrong_use_of_an_operator_is_explained(quick: dict[str, Checkpoint], store: Store) -> None:
    inputs = [quick[name] for name in MEMBERS]
    with pytest.raises(MergeError, match="no parameter 'wieght'; did you mean 'weight'"):
        make_merge(step("linear", *MEMBERS, wieght=1.0), inputs, None, store)
    with pytest.raises(MergeError, match="'weight' takes 3 values, one per input"):
        make_merge(step("linear", *MEMBERS, weight=[1.0]), inputs, None, store)
    with pytest.raises(MergeError, match="'slerp' takes exactly 2 models"):
        make_merge(step("slerp", *MEMBERS), inputs, None, store)
    with pytest.raises(MergeError, match=r"works on task vectors; set zoo\.base"):
        make_merge(step("ties", *MEMBERS), inputs, None, store)
    assert not (store.root / "merged").exists() or list((store.root / "merged").iterdir()) == []


def test_the_smoke_check_finds_broken_models(quick: dict[str, Checkpoint], tmp_path: Path, store: Store) -> None:
    inputs = [quick["stories-math"]]
    for name, spoil in (
        ("nan", lambda tensor: tensor * float("nan")),
        ("noise", lambda tensor: torch.randn_like(tensor.float()).to(tensor.dtype)),
    ):
        path = Path(shutil.copytree(inputs[0].path, tmp_path / name))
        state = load_file(path / "model.safetensors")
        for key in state:
            if "mlp" in key or "embed" in key:
                state[key] = spoil(state[key])
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        verdict = smoke_check(inspect_checkpoint(name, path, store), inputs)
        assert verdict is not None
        assert ("NaN" if name == "nan" else "perplexity exploded") in verdict


class Judge:
    """Scores known models as told and merges by their inputs; everything else about the bench is real."""

    def __init__(self, single: dict[str, float], merged: dict[frozenset[str], float]) -> None:
        self.single, self.merged = single, merged

    def __call__(self, checkpoint: Checkpoint) -> Scores:
        inputs = frozenset(checkpoint.lineage.inputs) if checkpoint.lineage else None
        value = self.merged[inputs] if inputs else self.single[checkpoint.id]
        return Scores(
            subject=checkpoint.id, split="proxy", tasks=(TaskScore(task="t", metric="acc", items={"i": value}),)
        )


def bench(quick: dict[str, Checkpoint], store: Store, judge: Judge, accept: str = "proxy") -> Workbench:
    zoo = Zoo(members=tuple(quick[name] for name in MEMBERS), base=quick["stories"])
    return Workbench(zoo=zoo, store=store, score=judge, accept=accept)


def planned(strategy: str, *steps: MergeStep) -> MergePlan:
    one = Cluster(id="cluster-1", members=MEMBERS, representative=MEMBERS[0], reason="")
    return STRATEGIES.get(strategy).plan(one, steps, judged=True)


def test_average_goes_best_first_and_keeps_what_holds(quick: dict[str, Checkpoint], store: Store) -> None:
    math, science, web = MEMBERS
    judge = Judge(
        {math: 0.5, science: 0.7, web: 0.6},
        {frozenset({science, web}): 0.65, frozenset({science, math}): 0.72},
    )
    plan = planned("average")
    assert (plan.merges, plan.evaluations) == (2, 5)
    outcome = merge_cluster(plan, bench(quick, store, judge))
    assert [trial.step.inputs for trial in outcome.trials] == [(science, web), (science, math)]
    assert [trial.accepted for trial in outcome.trials] == [False, True]
    assert outcome.merged == (science, math)
    assert outcome.whole == (web,)
    assert outcome.weights == {science: 0.5, math: 0.5}
    assert outcome.result is not None
    assert outcome.result.id == "merged-1"
    parts = [weights(quick[name]) for name in outcome.merged]
    for name, tensor in weights(outcome.result).items():
        assert close(tensor, (parts[0][name] + parts[1][name]) / 2)


def test_average_without_any_gain_merges_nothing(quick: dict[str, Checkpoint], store: Store) -> None:
    math, science, web = MEMBERS
    judge = Judge(
        {math: 0.5, science: 0.7, web: 0.6}, {frozenset({science, web}): 0.1, frozenset({science, math}): 0.1}
    )
    outcome = merge_cluster(planned("average"), bench(quick, store, judge))
    assert outcome.result is None
    assert sorted(outcome.whole) == sorted(MEMBERS)


def test_fixed_makes_chains_and_judges_against_the_best_source(quick: dict[str, Checkpoint], store: Store) -> None:
    math, science, web = MEMBERS
    steps = [
        MergeStep(name="pair", inputs=(math, science), operator="slerp"),
        MergeStep(name="all", inputs=("pair", web), operator="linear", parameters={"weight": [2.0, 1.0]}),
    ]
    single = {math: 0.5, science: 0.7, web: 0.6}
    good = Judge(single, {frozenset({math, science}): 0.8, frozenset({"pair", web}): 0.9})
    outcome = merge_cluster(planned("fixed", *steps), bench(quick, store, good))
    assert outcome.result is not None
    assert outcome.result.id == "all"
    assert sorted(outcome.merged) == sorted(MEMBERS)
    bad = Judge(single, {frozenset({math, science}): 0.75, frozenset({"pair", web}): 0.6})
    outcome = merge_cluster(planned("fixed", *steps), bench(quick, store, bad))
    assert outcome.result is not None
    assert outcome.result.id == "pair"
    assert outcome.whole == (web,)
    assert "falls below 0.7000 of its best source, stories-science" in outcome.trials[1].reason
    unseen = merge_cluster(planned("fixed", *steps), bench(quick, store, bad, accept="always"))
    assert unseen.result is not None
    assert unseen.result.id == "all"


def test_fixed_refuses_a_merge_across_clusters() -> None:
    steps = [MergeStep(name="x", inputs=(MEMBERS[0], "outsider"), operator="linear")]
    with pytest.raises(MergeError, match="'stories-math' and 'outsider', which are not in one cluster"):
        planned("fixed", *steps)


def test_a_cluster_that_cannot_be_merged_stays_whole(quick: dict[str, Checkpoint], store: Store) -> None:
    steps = [MergeStep(name="x", inputs=tuple(MEMBERS), operator="model_stock")]
    work = bench(quick, store, Judge(dict.fromkeys(MEMBERS, 0.5), {}))
    work.zoo = work.zoo.model_copy(update={"base": None})
    outcome = merge_cluster(planned("fixed", *steps), work)
    assert outcome.result is None
    assert outcome.whole == MEMBERS
    assert "set zoo.base" in outcome.trials[0].reason


def test_a_full_disk_stops_the_run_instead_of_the_branch(quick: dict[str, Checkpoint], store: Store) -> None:
    class Full(Judge):
        def __call__(self, checkpoint: Checkpoint) -> Scores:
            raise DiskFullError("full")

    with pytest.raises(DiskFullError):
        merge_cluster(planned("average"), bench(quick, store, Full({}, {})))
