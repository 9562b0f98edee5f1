"""Routers: the fold is exact, the text alone decides, and a saved router is the same router."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import RouterError
from composer.zoo import Checkpoint
from routers import ROUTERS, Brief, Candidate, Labelled, Policy
from routers.encoders import LayersEncoder, features_by_layer
from routers.gated import (
    CLEAR,
    by_expert,
    clearness,
    condition_number,
    kinds_of,
    left_out,
    macro,
    owners_of,
    shares_of,
    warnings_of,
)  # fmt: skip
from routers.linear import FittedGates
from routers.mlp import MLPGates
from routers.prompt import LinearGates, standardisation
from tests.checkpoints import write_sentence_encoder

MATH = ("Tom has 3 apples and buys 4 more. How many has he?", "A book costs $5. What do 7 books cost?",
        "There are 12 eggs in a box. How many are in 3 boxes?", "Ann walks 2 miles a day. How far in 9 days?",
        "A tank holds 40 liters and loses 8. How many are left?")  # fmt: skip
CODE = ("def add(a, b):\n    return a + b", "for i in range(10):\n    print(i)", "import os\nprint(os.getcwd())",
        "class Stack:\n    def push(self, x):", "Write a function to sort a list.\ndef sort_list(x):")  # fmt: skip
NEW = {
    "Sue has 5 pens and gives away 2. How many are left?": "stories-math",
    "while x > 0:\n    x = x - 1": "script",
}
READING = ("prompt", "linear", "mlp")
ALL = (*READING, "prompt_glue", "fixed", "random", "oracle")


def one_hot(*labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels)).float()


def test_the_fold_is_standardisation_then_direction() -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 5) * torch.tensor([1.0, 100.0, 0.01, 1.0, 3.0]) + 7
    labels = torch.arange(12) % 3
    gates = LinearGates()
    weights = gates.fit(features, one_hot(*labels.tolist()))
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    for expert in range(3):
        own = labels == expert
        direction = standard[own].mean(0) - standard[~own].mean(0)
        expected = standard @ (direction / direction.norm())
        assert torch.allclose(gates.score(weights, features)[:, expert], expected, atol=1e-3)
        assert torch.allclose(gates.directions(weights)[expert], direction / direction.norm(), atol=1e-5)  # type: ignore[index]


def test_a_constant_dimension_does_no_harm() -> None:
    features = torch.cat([torch.eye(4), torch.full((4, 1), 1e6)], dim=1)
    weights = LinearGates().fit(features, one_hot(0, 0, 1, 1))
    assert all(torch.isfinite(one).all() for one in weights.values())


def test_a_fitted_gate_is_scikit_learns(quick: dict[str, Checkpoint]) -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    features, labels = torch.randn(60, 6) * 3 + 1, torch.arange(60) % 3
    features[torch.arange(60), labels] += 4
    gates = FittedGates()
    scores = gates.score(gates.fit(features, one_hot(*labels.tolist())), features)
    mean, deviation = standardisation(features)
    model = LogisticRegression(C=0.01, max_iter=1000).fit(((features - mean) / deviation).numpy(), labels.numpy())
    expected = torch.from_numpy(model.predict_proba(((features - mean) / deviation).numpy())).float()
    assert torch.allclose(scores.softmax(dim=1), expected, atol=1e-4)
    two = gates.fit(features, one_hot(*(labels > 0).long().tolist()))
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(
        ((features - mean) / deviation).numpy(), (labels > 0).numpy()
    )
    chances = gates.score(two, features).softmax(dim=1)[:, 1]
    known = torch.from_numpy(fitted.predict_proba(((features - mean) / deviation).numpy())[:, 1]).float()
    assert torch.allclose(chances, known, atol=1e-4)


def test_an_mlp_learns_what_no_line_separates_and_draws_for_itself_alone() -> None:
    torch.manual_seed(1)
    features = torch.rand(200, 2) * 2 - 1
    labels = ((features[:, 0] * features[:, 1]) > 0).long()
    state = torch.random.get_rng_state()
    gates = MLPGates()
    first, second = (gates.fit(features, one_hot(*labels.tolist()), seed=3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    right = (gates.score(first, features).argmax(1) == labels).float().mean()
    line = FittedGates()
    straight = (line.score(line.fit(features, one_hot(*labels.tolist())), features).argmax(1) == labels).float().mean()
    assert right > 0.9
    assert straight < 0.7


def test_an_expert_with_few_examples_costs_the_others_none_of_theirs() -> None:
    torch.manual_seed(0)
    labels = (*[0] * 20, *[1] * 2)
    seen: list[int] = []

    class Counting(FittedGates):
        def fit(self, features: torch.Tensor, shares: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
            seen.append(int(shares[:, 0].sum()))
            return super().fit(features, shares, seed)

    pairs = left_out(Counting(), torch.randn(22, 4), one_hot(*labels))
    assert len(pairs) == 22
    assert min(seen) >= 18


@pytest.mark.parametrize("gates", [LinearGates(), FittedGates()], ids=["prompt", "linear"])
def test_leaving_out_tries_every_example_that_has_company(gates: LinearGates) -> None:
    torch.manual_seed(0)
    labels = (0, 1, 1, 1, 2, 2, 2)
    features = torch.randn(7, 4) + 5 * torch.nn.functional.one_hot(torch.tensor(labels), 4)
    found = left_out(gates, features, one_hot(*labels))
    assert sorted(one.own for one in found) == [1, 1, 1, 2, 2, 2]
    assert macro([one.pair for one in found]) == 1.0
    assert all(one.lead > 0 for one in found)
    assert left_out(gates, torch.randn(2, 4), one_hot(0, 1)) == []


def test_an_expert_of_many_kinds_has_a_gate_for_each() -> None:
    """Opposite kinds of one expert cancel out in a common mean; the other expert lies between them."""
    torch.manual_seed(0)
    centres = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 2.0]])
    candidates = (
        Candidate(id="merged", path="", parameters=1, examples=tuple("abcdefghijklmnopqrst"), groups=(10, 0, 10)),
        Candidate(id="whole", path="", parameters=1, examples=tuple("ABCDEFGHIJ")),
    )
    owners = owners_of(candidates)
    assert owners == (0, 0, 1)
    assert owners_of(candidates[1:]) == owners_of([candidates[0].model_copy(update={"groups": ()})]) == ()
    kind = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    features, gates = centres[kind] + torch.randn(30, 2), LinearGates()
    grouped = kinds_of(candidates)
    assert torch.equal(grouped.argmax(dim=1), kind)
    new = centres[[0, 1, 2] * 50] + torch.randn(150, 2)
    right = torch.tensor([0, 0, 1] * 50)

    def accuracy(weights: dict[str, torch.Tensor], of_gate: tuple[int, ...]) -> float:
        return float((by_expert(gates.score(weights, new), of_gate).argmax(dim=1) == right).float().mean())

    assert accuracy(gates.fit(features, grouped), owners) > 0.9
    assert accuracy(gates.fit(features, shares_of(candidates)), ()) < 0.85
    alone, together = left_out(gates, features, shares_of(candidates)), left_out(gates, features, grouped, owners)
    assert macro([one.pair for one in together]) > macro([one.pair for one in alone])
    assert clearness(together) > clearness(alone)


@pytest.mark.parametrize("name", READING)
def test_a_merged_expert_is_found_by_each_kind_of_its_requests(
    name: str, candidates: tuple[Candidate, ...], tmp_path: Path
) -> None:
    plays = ("O that this too too solid flesh would melt", "Now is the winter of our discontent",
             "What's in a name? that which we call a rose", "The quality of mercy is not strained",
             "If music be the food of love, play on")  # fmt: skip
    merged = candidates[0].model_copy(update={"examples": (*MATH, *plays), "groups": (5, 5)})
    kind = ROUTERS.get(name)
    manifest = kind.build(brief((merged, candidates[1]), encoder="script"), tmp_path)
    assert manifest.owners == (0, 0, 1)
    assert manifest.experts == ("stories-math", "script")
    router = kind.load(manifest, tmp_path, (merged, candidates[1]))
    for text, expert in {**NEW, "Shall I compare thee to a summer's day?": "stories-math"}.items():
        decision = router.route(text)
        assert decision.expert == expert
        assert set(decision.scores) == set(manifest.experts)
    learnt = kind.build(brief((merged, candidates[1]), encoder="script", labelled=LABELLED), tmp_path)
    assert learnt.owners == (() if name != "prompt" else (0, 0, 1)), "labels are for experts, not for kinds of requests"


def test_of_layers_that_are_all_right_the_first_clear_one_reads(
    candidates: tuple[Candidate, ...], tmp_path: Path
) -> None:
    manifest = ROUTERS.get("prompt").build(brief(candidates, encoder="script"), tmp_path)
    assert manifest.encoder is not None
    by_layer = features_by_layer(candidates[1], (*MATH, *CODE))
    tried = [left_out(LinearGates(), layer, one_hot(*[0] * 5, *[1] * 5)) for layer in by_layer]
    right = [macro([one.pair for one in found]) for found in tried]
    most = max(clearness(found) for found, one in zip(tried, right, strict=True) if one == max(right))
    good = [place for place, one in enumerate(right) if one == max(right) and clearness(tried[place]) >= CLEAR * most]
    assert manifest.encoder.layers == good[0]


def test_the_condition_number_tells_gates_that_are_alike() -> None:
    torch.manual_seed(0)
    means = torch.eye(4)
    assert condition_number(means - means.mean(0)) == pytest.approx(1.0, abs=1e-4), "one against the rest"
    means[1] = means[0] + 1e-3 * torch.randn(4)
    assert condition_number(means - means.mean(0)) > 100


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_truncated_encoder_gives_the_whole_models_states(quick: dict[str, Checkpoint], layers: int) -> None:
    for name in ("stories", "script"):
        one = Candidate(id=name, path=quick[name].path, parameters=1)
        expected = features_by_layer(one, [MATH[0]])[layers, 0]
        assert torch.allclose(LayersEncoder(one.path, layers)(MATH[0]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def candidates(quick: dict[str, Checkpoint]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(id=name, path=quick[name].path, parameters=quick[name].parameters, examples=examples)
        for name, examples in (("stories-math", MATH), ("script", CODE))
    )


LABELLED = tuple(Labelled(text=text, shares={expert: 1.0}) for text, expert in NEW.items())


def brief(candidates: tuple[Candidate, ...], **options: object) -> Brief:
    policy = Policy(abstain_to="script", **options.pop("policy", {}))  # type: ignore[arg-type]
    return Brief(candidates=candidates, policy=policy, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [False, True], ids=["layers", "table"])
@pytest.mark.parametrize("name", READING)
def test_a_router_routes_and_loads_as_it_was_saved(
    name: str, table: bool, candidates: tuple[Candidate, ...], tmp_path: Path
) -> None:
    kind = ROUTERS.get(name)
    manifest = kind.build(brief(candidates, table=table), tmp_path)
    assert manifest.experts == ("stories-math", "script")
    assert manifest.leave_one_out is not None
    assert manifest.leave_one_out > 0.7
    assert manifest.encoder is not None
    assert manifest.encoder.kind == ("table" if table else "layers")
    first, second = (kind.load(manifest, tmp_path, candidates) for _ in range(2))
    for text, expert in NEW.items():
        decision = first.route(text)
        assert decision.expert == expert
        assert decision == second.route(text)
        assert decision.margin >= 0
    for text in ("", " ", "\U0001f600", "x" * 5000):
        assert first.route(text).expert in manifest.experts


@pytest.mark.parametrize("name", ALL)
def test_a_text_goes_to_one_expert_whatever_came_before(
    name: str, candidates: tuple[Candidate, ...], tmp_path: Path
) -> None:
    kind = ROUTERS.get(name)
    manifest = kind.build(brief(candidates, labelled=LABELLED, layer=1), tmp_path)
    router = kind.load(manifest, tmp_path, candidates)
    texts = [*NEW, *MATH, *CODE]
    forward = [router.route(text) for text in texts]
    assert [router.route(text) for text in reversed(texts)] == forward[::-1]


def test_the_routers_to_compare_with_do_what_they_say(candidates: tuple[Candidate, ...], tmp_path: Path) -> None:
    def chosen(name: str, texts: list[str]) -> list[str]:
        kind = ROUTERS.get(name)
        router = kind.load(kind.build(brief(candidates, labelled=LABELLED), tmp_path), tmp_path, candidates)
        return [router.route(text).expert for text in texts]

    many = [f"text {number}" for number in range(400)]
    assert set(chosen("fixed", many)) == {"script"}
    assert 150 < chosen("random", many).count("script") < 250
    assert chosen("oracle", [*NEW, "something else"]) == [*NEW.values(), "script"]
    with pytest.raises(RouterError, match="oracle"):
        ROUTERS.get("oracle").build(brief(candidates), tmp_path)


def test_labelled_texts_are_learnt_by_those_that_learn(candidates: tuple[Candidate, ...], tmp_path: Path) -> None:
    # What no example says: poems are for the coder.
    poems = ("roses are red, violets are blue", "o captain, my captain", "the fog comes on little cat feet",
             "because i could not stop for death", "two roads diverged in a yellow wood")  # fmt: skip
    labelled = tuple(Labelled(text=text, shares={"script": 1.0}) for text in poems * 3)
    for name, count in (("prompt", 0), ("linear", 15), ("mlp", 15)):
        kind = ROUTERS.get(name)
        manifest = kind.build(brief(candidates, labelled=labelled, encoder="script", layer=2), tmp_path)
        assert manifest.learnt_from == count
        if count:
            router = kind.load(manifest, tmp_path, candidates)
            assert router.route("shall i compare thee to a summer's day").expert == "script"
            assert router.route(MATH[0]).expert == "stories-math"


def test_a_sentence_encoder_reads_from_a_directory(candidates: tuple[Candidate, ...], tmp_path: Path) -> None:
    source = write_sentence_encoder(tmp_path / "encoder")
    kind = ROUTERS.get("prompt")
    for table in (False, True):
        manifest = kind.build(brief(candidates, encoder=str(source), table=table), tmp_path)
        assert manifest.encoder is not None
        assert (manifest.encoder.source, manifest.encoder.layers) == (str(source), None)
        assert kind.load(manifest, tmp_path, candidates).route(MATH[0]).expert == "stories-math"
    with pytest.raises(RouterError, match="'gpt' is no expert, and cannot be loaded as a sentence encoder"):
        kind.build(brief(candidates, encoder="gpt"), tmp_path)
    with pytest.raises(RouterError, match=r"'scirpt' is no expert; did you mean 'script'\?"):
        kind.build(brief(candidates, encoder="scirpt"), tmp_path)


def test_examples_that_cannot_route_are_refused_or_reported(candidates: tuple[Candidate, ...], tmp_path: Path) -> None:
    kind = ROUTERS.get("prompt")
    math, code = candidates

    def with_examples(*examples: str) -> tuple[Candidate, ...]:
        return (math, code.model_copy(update={"examples": examples}))

    with pytest.raises(RouterError, match="expert 'script' has no example requests"):
        kind.build(brief(with_examples()), tmp_path)
    with pytest.raises(RouterError, match="'stories-math' and 'script' have the same example requests"):
        kind.build(brief(with_examples(*MATH[::-1])), tmp_path)
    manifest = kind.build(brief(with_examples("red", "blue")), tmp_path)
    text = " ".join(manifest.warnings)
    assert "single words" in text
    assert "script has 2 example requests; give 5 to 10" in text
    shared = kind.build(brief(with_examples(*CODE, MATH[0])), tmp_path)
    assert "script and stories-math share 1 examples" in " ".join(shared.warnings)
    third = math.model_copy(update={"id": "third", "examples": (*MATH[:4], "How many legs have 5 dogs?")})
    alike = kind.build(brief((math, code, third)), tmp_path)
    assert "find their own expert when left out" in " ".join(alike.warnings)
    assert "gates point nearly the same way" in " ".join(warnings_of(candidates, 0.9, Counter(), 50.0))
    assert warnings_of(candidates, 0.9, Counter(), 5.0) == ()
    with pytest.raises(RouterError, match=r"mixture\.router\.layer: 99, but script has 4 layers"):
        kind.build(brief(candidates, encoder="script", layer=99), tmp_path)


Scores = dict[str, float]


def test_a_policy_abstains_prefers_and_saves() -> None:
    plain = Policy(abstain_to="b", costs={"a": 10.0, "b": 1.0, "c": 5.0})
    scores = {"a": 1.0, "b": 0.0, "c": 0.9}
    assert plain.decide(scores).expert == "a"
    assert plain.decide(scores).margin == pytest.approx(0.1)
    unclear = plain.model_copy(update={"threshold": 0.6}).decide(scores)
    assert (unclear.expert, unclear.abstained) == ("b", True)
    assert "below 0.6" in unclear.reason
    saving = plain.model_copy(update={"tie": 0.05}).decide(scores)
    assert (saving.expert, saving.abstained) == ("c", False)
    assert "cheaper" in saving.reason
    assert plain.model_copy(update={"weights": {"b": 10.0}}).decide(scores).expert == "b"
    sharp = plain.model_copy(update={"temperature": 0.01})
    assert sharp.decide(scores).confidence > 0.99


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(-1e6, 1e6), min_size=1),
    st.floats(0, 0.99),
    st.floats(1e-3, 1e3),
    st.floats(0, 0.5),
)
def test_a_policy_always_decides(scores: Scores, threshold: float, temperature: float, tie: float) -> None:
    policy = Policy(abstain_to="z", threshold=threshold, temperature=temperature, tie=tie, costs={"a": 1.0})
    decision = policy.decide(scores)
    assert decision.expert in (*scores, "z")
    assert (decision.expert == "z") == decision.abstained
    assert sum(policy.probabilities(scores).values()) == pytest.approx(1.0)
    assert 0 < decision.confidence <= 1
    json.dumps(decision.model_dump(), allow_nan=False)
