"""Recipes: strict, with errors that say file, line, what was read and the nearest right name."""

import json
from pathlib import Path

import pytest

from composer.errors import RecipeError
from composer.recipe import json_schema, load_recipe, override
from tests.conftest import ROOT

GOOD = """\
# A comment.
name: small
zoo:
  models:
    - id: one.5          # ids may hold dots
      model: models/one
      examples: ["Hello?"]
    - {id: two, model: /models/two}
merge:
  strategy: average
evaluate:
  tasks: [quick_math]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(GOOD)
    return path


def change(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_what_is_no_path_here_may_be_a_hub_id(recipe: Path) -> None:
    assert load_recipe(recipe).zoo.models[0].model == "models/one"
    for text in ("./models/one", "models/one/deeper", "models/one.gguf"):
        path = change(recipe, "model: models/one", f"model: {text}")
        assert load_recipe(path).zoo.models[0].model == str((recipe.parent / text).resolve())
        change(recipe, f"model: {text}", "model: models/one")
    path = change(recipe, "model: models/one", "model: org/name@v1.2")
    assert load_recipe(path).zoo.models[0].model == "org/name@v1.2"


def test_relative_paths_start_at_the_recipe(recipe: Path) -> None:
    (recipe.parent / "models" / "one").mkdir(parents=True)
    models = load_recipe(recipe).zoo.models
    assert models[0].model == str(recipe.parent / "models/one")
    assert models[1].model == "/models/two"


def test_unknown_key_gives_line_value_and_nearest_name(recipe: Path) -> None:
    message = failure(change(recipe, "strategy: average", "stratgy: average"))
    assert message == f"{recipe}:10: merge.stratgy: unknown key (read 'average'); did you mean 'strategy'?"


def test_unknown_key_inside_a_list_item(recipe: Path) -> None:
    message = failure(change(recipe, "model: models/one", "modell: models/one"))
    assert f"{recipe}:6: zoo.models.0.modell: unknown key (read 'models/one'); did you mean 'model'?" in message
    assert "zoo.models.0.model: missing" in message


def test_wrong_type_is_not_converted(recipe: Path) -> None:
    message = failure(change(recipe, "strategy: average", "strategy: average\ncluster: {threshold: high}"))
    assert f"{recipe}:11: cluster.threshold:" in message
    assert "(read 'high')" in message


def test_a_strategy_that_does_not_exist_is_refused(recipe: Path) -> None:
    message = failure(change(recipe, "strategy: average", "strategy: simmerg"))
    assert f"{recipe}:10: merge.strategy: there is no strategy 'simmerg'; did you mean 'simmerge'?" in message
    assert "average, coefficient, similarity, evolution, simmerge, bandit, fixed, none" in message


def test_two_models_with_one_id(recipe: Path) -> None:
    message = failure(change(recipe, "id: two", "id: one.5"))
    assert f"{recipe}:3: zoo: two models have the id 'one.5'" in message


def test_empty_zoo(recipe: Path) -> None:
    recipe.write_text("name: empty\nzoo: {models: []}\nevaluate: {tasks: [a]}\n")
    assert f"{recipe}:2: zoo.models: List should have at least 1 item" in failure(recipe)


def test_composite_named_like_a_model(recipe: Path) -> None:
    assert "'two', is also a model's id" in failure(change(recipe, "name: small", "name: two"))


def test_fixed_needs_merges_and_knows_their_names(recipe: Path) -> None:
    change(recipe, "strategy: average", "strategy: fixed")
    assert "strategy 'fixed' needs 'merges'" in failure(recipe)
    change(
        recipe,
        "strategy: fixed",
        "strategy: fixed\n  merges:\n    - {name: both, operator: linear, models: [one.5, tow]}",
    )
    assert "merge 'both' uses 'tow', which is no model; did you mean 'two'?" in failure(recipe)
    change(recipe, "tow", "two")
    change(recipe, "operator: linear", "operator: lineal")
    assert f"{recipe}:12: merge.merges.0.operator: there is no operator 'lineal'; did you mean 'linear'?" in failure(
        recipe
    )


def test_an_operators_parameters_are_checked_in_the_recipe(recipe: Path) -> None:
    change(
        recipe,
        "strategy: average",
        "strategy: fixed\n  merges:\n"
        "    - {name: both, operator: ties, models: [one.5, two], parameters: {densty: 0.5}}",
    )
    message = failure(recipe)
    assert f"{recipe}:12: merge.merges.0: operator 'ties' has no parameter 'densty'; did you mean 'density'?" in message
    change(recipe, "operator: ties", "operator: slerp")
    change(recipe, "parameters: {densty: 0.5}", "parameters: {t: [0.1]}")
    assert "'t' takes a number or a list of two or more numbers, one per group of layers" in failure(recipe)
    change(recipe, "t: [0.1]", "t: 1.5")
    assert "'t' must be at least 0 and at most 1 (read 1.5)" in failure(recipe)


def test_not_yaml(recipe: Path) -> None:
    recipe.write_text("name: [\n")
    assert f"{recipe}:2: not valid YAML" in failure(recipe)


def test_missing_file(tmp_path: Path) -> None:
    assert "there is no such recipe file" in failure(tmp_path / "absent.yaml")


def test_overrides_by_key_number_and_id(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        ["cluster.threshold=0.5", "zoo.models.0.examples=[a, b]", "zoo.models.one.5.model=/new", "serve.port=0"],
    )
    assert loaded.cluster.threshold == 0.5
    assert loaded.zoo.models[0].examples == ["a", "b"]
    assert loaded.zoo.models[0].model == "/new"
    assert loaded.serve.port == 0


def test_a_wrong_override_is_placed_on_the_command_line(recipe: Path) -> None:
    message = failure(recipe, "cluster.treshold=1")
    assert message == "command line: cluster.treshold: unknown key (read 1); did you mean 'threshold'?"
    assert "is not of the form key=value" in failure(recipe, "threshold")
    assert "there is no item 'twoo'; did you mean 'two'?" in failure(recipe, "zoo.models.twoo.model=x")


def test_a_resolved_recipe_can_be_overridden(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert override(loaded, ["serve.port=9"]).serve.port == 9
    with pytest.raises(RecipeError, match="did you mean 'port'"):
        override(loaded, ["serve.prot=9"])


def test_environment_variables_in_paths(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(recipe, "models/one", "${SOME_ZOO}/one")
    monkeypatch.delenv("SOME_ZOO", raising=False)
    message = failure(recipe)
    assert f"{recipe}:6: zoo.models.0.model: the environment variable SOME_ZOO is not set" in message
    monkeypatch.setenv("SOME_ZOO", "/zoo")
    assert load_recipe(recipe).zoo.models[0].model == "/zoo/one"


def test_the_checked_in_schema_is_current() -> None:
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json_schema(), "run 'make schema'"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_validates_and_opens_with_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSER_ZOO", "/zoo")
    monkeypatch.setenv("COMPOSER_DATA", "/data")
    load_recipe(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"model-composer run recipes/{path.name}" in line for line in header)
