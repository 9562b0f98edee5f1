"""The recipe's `merge`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from composer.errors import MergeError
from composer.merging.operators import OPERATORS
from composer.merging.plan import MergeStep
from composer.merging.strategies import STRATEGIES
from composer.settings import Identifier, PathText, Section, named


class FixedMerge(Section):
    """One merge of a `fixed` strategy."""

    name: Identifier
    """The merged model's name; later merges may use it as an input."""
    models: list[Identifier] = Field(min_length=1)
    """Ids of models, or names of earlier merges, in order."""
    operator: named(OPERATORS)  # type: ignore[valid-type]
    """The merge operator; `model-composer operators` lists them."""
    parameters: dict[str, float | bool | list[float | list[float]]] = {}
    """The operator's parameters. A list gives one value per model, or for a parameter of the whole merge one per
    group of layers; a list in a list, one per group of layers. What is not given takes its default."""

    @model_validator(mode="after")
    def _the_operator_takes_them(self) -> Self:
        try:
            OPERATORS.get(self.operator).resolve(self.operator, len(self.models), self.parameters)
        except MergeError as error:
            raise ValueError(str(error)) from None
        return self


class EvolutionSection(Section):
    """How strategy `evolution` searches."""

    trials: int = Field(default=100, ge=1)
    """Candidates that are tried."""
    layer_groups: int = Field(default=1, ge=1)
    """Runs of layers with coefficients of their own; with more than one, all that is in no layer is one more."""
    search: list[str] = []
    """Parameters that are searched besides the operator's coefficients, e.g. [density]."""
    population: Annotated[int, Field(ge=2)] | None = None
    """Candidates of a generation; by default 4 + 3 ln(number of coefficients)."""
    warm_start: bool = True
    """Begin at what strategy `coefficient` finds."""


class SimMergeSection(Section):
    """How strategy `simmerge` predicts and chooses."""

    predictor: PathText | None = None
    """A predictor of one's own, from `model-composer simmerge train`; by default the program's."""
    risk: float = Field(default=0.9, gt=0, lt=1)
    """How probable a loss may be: a merge that is less sure to gain than 1 - risk is not tried. What is tried costs a
    merge in memory and is kept only if it gains on the proxy items, so by default only what is nearly sure to lose is
    refused."""
    tries: int = Field(default=3, ge=1)
    """Predicted merges that are made in memory and scored on the proxy split, the best first."""
    most: Annotated[int, Field(ge=2)] | None = None
    """Sources of a merge, at most."""
    labels: bool = True
    """Whether the predictor may use what single models score on the proxy split, and not their behaviour alone."""


class BanditSection(Section):
    """How strategy `bandit` chooses."""

    rounds: int = Field(default=8, ge=1)
    """Merges that are made in memory and scored, one after another."""
    policy: Literal["linucb", "thompson"] = "linucb"
    """linucb adds standard errors to what is expected; thompson draws from what is believed."""
    exploration: float = Field(default=0.3, ge=0)
    """Standard errors that are added, or that a draw is wide."""
    predictor: bool = True
    """Whether it begins where the predictor is, or from nothing."""


class MergeSection(Section):
    """How a cluster becomes one model."""

    strategy: named(STRATEGIES) = "simmerge"  # type: ignore[valid-type]
    """`average` and `coefficient` merge the members in one after another, the best first, with equal weights or with
    the best of a grid; `similarity` the most (or least) similar first; `evolution` searches all coefficients at once;
    `simmerge` makes what a predictor says will gain; `bandit` learns from every merge which to make next;
    `fixed` makes the merges listed; `none` merges nothing."""
    operators: Annotated[list[named(OPERATORS)], Field(min_length=1)] | None = None  # type: ignore[valid-type]
    """What is merged with. A search tries each and keeps the best result; by default it is `linear`. `simmerge` and
    `bandit` weigh each; by default all that the predictor knows."""
    coefficients: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1
    )
    """The grid: for a weighted mean what the merge so far keeps of the whole, for task vectors what they are
    multiplied by, for two models the place between them."""
    order: Literal["most_similar", "least_similar"] = "most_similar"
    """For `similarity`: what is merged in next."""
    evolution: EvolutionSection = EvolutionSection()
    """For `evolution`."""
    simmerge: SimMergeSection = SimMergeSection()
    """For `simmerge`, and what `bandit` begins with."""
    bandit: BanditSection = BanditSection()
    """For `bandit`."""
    merges: list[FixedMerge] = []
    """For `fixed`: the merges, in order."""
    accept: Literal["proxy", "always"] = "proxy"
    """`proxy`: a merge that does not beat the best it is made of on the proxy split is not kept."""
    margin: float = Field(default=1.0, ge=0)
    """By how many standard errors of the paired difference a merge must be ahead to be kept."""
    protect: list[str] = []
    """Tasks that must not drop: a merge that scores lower on one of them than any model it is made of, on the proxy
    items, is not kept, whatever it gains elsewhere."""
    early_stopping: bool = True
    """Drop candidates that are clearly behind before they have been scored on all proxy items."""
    tokenizer: Literal["union", "base"] = "union"
    """Where vocabularies differ by added tokens: keep every token of any, or those of the base (or first) model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What merged weights are stored in; by default, what the sources are stored in."""
    seed: int = 0
    """Seed of random masks and of the evolution."""

    @property
    def steps(self) -> tuple[MergeStep, ...]:
        """The merges of strategy `fixed`."""
        return tuple(
            MergeStep(name=one.name, operator=one.operator, inputs=tuple(one.models), parameters=one.parameters)
            for one in self.merges
        )

    @property
    def searched(self) -> list[str]:
        """The operators of a search."""
        return self.operators or ["linear"]

    @model_validator(mode="after")
    def _merges_belong_to_fixed(self) -> Self:
        if self.strategy == "fixed" and not self.merges:
            raise ValueError("strategy 'fixed' needs 'merges', a list of the merges to make")
        if self.strategy != "fixed" and self.merges:
            raise ValueError(f"'merges' is for strategy 'fixed' only; the strategy is '{self.strategy}'")
        if self.protect and self.accept == "always":
            raise ValueError("'protect' refuses merges and 'accept: always' keeps them all; leave one of the two out")
        names = [merge.name for merge in self.merges]
        if len(set(names)) < len(names):
            raise ValueError("two merges have the same name")
        return self
