"""Levels: a recipe's experts as one model, with gates made of their example requests."""

from pathlib import Path

import httpx
import pytest
import torch

from composer.artefacts import Store
from composer.errors import RecipeError
from composer.evaluation.endpoint import ComposedModel
from composer.evaluation.in_process import score_checkpoint
from composer.evaluation.tasks import load_split, run_tasks
from composer.mixture import Composite, Expert, build_composite
from composer.mixture.levels import without_bias
from composer.mixture.settings import MixtureSection, RouterSection
from composer.serving.server import Server
from composer.serving.settings import ServeSection
from composer.zoo import Checkpoint
from tests.conftest import NOT_ASKED, QUICKSTART
from tests.mixtures import answers, batch_of, load
from tests.test_routers import CODE, MATH

LAW = ("The tenant shall pay rent on the first of the month.", "Is a spoken contract binding?",
       "What does the court decide in a civil case?", "The defendant pleads not guilty.",
       "May a landlord enter?")  # fmt: skip
SECTIONS = {
    "block": MixtureSection(level="block"),
    "block, one gate, hybrid": MixtureSection(level="block", shared_gate=True, dense_layers=2),
    "block by token": MixtureSection(level="block", routing="token", top_k=2),
    "ffn": MixtureSection(level="ffn", top_k=2),
    "ffn, hybrid": MixtureSection(level="ffn", dense_layers=1, dense="stories-law"),
    "models together": MixtureSection(top_k=2),
}


def experts_of(quick: dict[str, Checkpoint], **examples: tuple[str, ...]) -> tuple[Expert, ...]:
    return tuple(
        Expert(id=f"stories-{name}", checkpoint=quick[f"stories-{name}"], members=(f"stories-{name}",), examples=own,
               reason="a test")
        for name, own in examples.items()
    )  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_experts_become_one_model_that_is_scored_like_any(
    name: str, quick: dict[str, Checkpoint], store: Store
) -> None:
    experts = experts_of(quick, math=MATH, law=LAW)
    path = build_composite("mix", experts, {}, SECTIONS[name], store, NOT_ASKED)
    composite = Composite.open(path)
    [whole] = composite.experts
    assert composite.router is None
    assert composite.gates is not None
    assert composite.gates.experts == ("stories-math", "stories-law")
    assert whole.members == ("stories-math", "stories-law")
    assert whole.checkpoint.parameters > quick["stories-math"].parameters
    assert path == build_composite("mix", experts, {}, SECTIONS[name], store, NOT_ASKED)
    split = load_split(["quick_math"], "held_out", include=str(QUICKSTART / "tasks"), limit=24)
    each = [score_checkpoint(one.checkpoint, split, store).mean for one in experts]
    assert score_checkpoint(whole.checkpoint, split, store).mean >= min(each) > 0.6, "chance is a half"
    assert whole.checkpoint.context_length == quick["stories-math"].context_length
    assert answers(load(whole.checkpoint.path), batch_of(MATH[0])).shape == (1, 6)
    card = (path / "README.md").read_text()
    assert "Experts inside: stories-math, stories-law" in card
    assert "apache-2.0" in card.lower()


def test_a_prompt_goes_to_the_expert_whose_examples_it_resembles(quick: dict[str, Checkpoint], store: Store) -> None:
    experts = experts_of(quick, math=MATH, law=LAW)
    path = build_composite("mix", experts, {}, SECTIONS["models together"], store, NOT_ASKED)
    model = load(Composite.open(path).experts[0].checkpoint.path)
    for place, texts in enumerate((MATH, LAW)):
        with torch.inference_mode():
            shares = model(**batch_of(*texts).inputs).past_key_values.shares
        assert (shares[:, place] > 0.5).float().mean() >= 0.8


def test_models_that_do_not_fit_a_level_are_told_what_would(quick: dict[str, Checkpoint], store: Store) -> None:
    other = Expert(
        id="script-code", checkpoint=quick["script-code"], members=("script-code",), examples=CODE, reason=""
    )
    experts = (*experts_of(quick, math=MATH), other)
    for section in (SECTIONS["block"], SECTIONS["ffn"]):
        with pytest.raises(RecipeError, match=r"mixture\.level: .*'script-code'.*architecture.*model works for any"):
            build_composite("mix", experts, {}, section, store, NOT_ASKED)
    with pytest.raises(RecipeError, match=r"another tokenizer; mixture\.top_k: 1 works for any models"):
        build_composite("mix", experts, {}, SECTIONS["models together"], store, NOT_ASKED)
    with pytest.raises(RecipeError, match=r"mixture\.dense: 'stories-mth' is no expert; did you mean 'stories-math'"):
        section = MixtureSection(level="block", dense="stories-mth")
        build_composite("mix", experts_of(quick, math=MATH, law=LAW), {}, section, store, NOT_ASKED)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dense_layers": 1}, "only levels block and ffn"),
        ({"level": "ffn", "routing": "sample"}, "level block can do otherwise"),
        ({"level": "block", "router": RouterSection(kind="mlp")}, "a gate inside a model is one linear layer"),
        ({"top_k": 2, "router": RouterSection(kind="fixed")}, "a gate inside a model is one linear layer"),
        ({"level": "block", "router": RouterSection(threshold=0.5)}, "router threshold: only whole models"),
        ({"level": "ffn", "router": RouterSection(layer=2)}, "router layer: only whole models"),
        ({"top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_their_level_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureSection(**wrong)  # type: ignore[arg-type]


def test_gates_without_bias_choose_as_those_with_it() -> None:
    torch.manual_seed(0)
    mean = 20 * torch.randn(1, 1, 32)
    seen = mean + torch.randn(1, 200, 32)
    weight = torch.randn(1, 5, 32)
    wanted = (seen - mean) @ weight.transpose(1, 2)
    found = seen @ without_bias(weight, seen).transpose(1, 2)
    agree = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
    raw = ((seen @ weight.transpose(1, 2)).argmax(-1) == wanted.argmax(-1)).float().mean()
    assert agree > 0.8
    assert raw < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("block", "transformers"), ("models together", "transformers")])
def test_a_mixture_is_served_like_any_model(
    name: str, kind: str, quick: dict[str, Checkpoint], store: Store, tmp_path: Path
) -> None:
    path = build_composite("mix", experts_of(quick, math=MATH, law=LAW), {}, SECTIONS[name], store, NOT_ASKED)
    with Server(path, ServeSection(port=0), tmp_path / "logs", store=store) as server:
        assert set(server.endpoint.engines.values()) == {kind}
        body = {"model": "mix", "prompt": MATH[0], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.endpoint.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        served = answer.json()["choices"][0]["text"]
        split = load_split(["quick_math"], "held_out", include=str(QUICKSTART / "tasks"), limit=8)
        composite = Composite.open(path)
        through = run_tasks(ComposedModel(server.endpoint, composite), split, "mix")
        assert through.tasks == score_checkpoint(composite.experts[0].checkpoint, split, store).tasks
    from transformers import AutoTokenizer

    home = Composite.open(path).experts[0].checkpoint.path
    model, tokenizer = load(home), AutoTokenizer.from_pretrained(home)
    ids = tokenizer(MATH[0], return_tensors="pt").input_ids
    found = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert served == tokenizer.decode(found, skip_special_tokens=True)
