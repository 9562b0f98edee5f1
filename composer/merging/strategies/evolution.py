"""Strategy `evolution`: coefficients of all members at once, by CMA-ES.

Model-GLUE's evolutionary search (arXiv 2410.05357, section 3.2) with CMA-ES (Hansen, arXiv 1604.00772), begun at what
the strategy `coefficient` finds, as its Table 17 recommends. Layers may have coefficients of their own, in groups.
Candidates are drawn from one seed and everything that was scored is in the log, so a search that was killed goes
through what it knows to where it was, and on.
"""

from collections.abc import Iterator
from math import log

from composer.clustering import Cluster
from composer.errors import MergeError
from composer.evaluation.statistics import paired_gain
from composer.merging.operators import OPERATORS, Operator, Parameter
from composer.merging.plan import MergeOutcome, MergePlan, MergeStep, Trial
from composer.merging.settings import MergeSection
from composer.merging.strategies.greedy import coefficient, decide, settle
from composer.merging.strategies.growth import Growth
from composer.merging.workbench import Standing, Workbench

STEP = 1 / 6
"""First standard deviation, as a part of each parameter's range; Model-GLUE's."""
DIGITS = 4
"""Decimals of a parameter: what is finer makes no difference that could be measured."""
WORST = 1e3
"""What CMA-ES is told of a candidate that failed; any score is better."""


class Evolution:
    """Searches the coefficients of all members at once."""

    def plan(self, cluster: Cluster, section: MergeSection) -> MergePlan:
        """Plan the search it begins with, and so many trials.

        Raises:
            MergeError: if there is nothing to search with an operator.
        """
        before = coefficient.plan(cluster, section)
        for name in section.searched:
            _Space(name, cluster.members, section)
        trials = section.evolution.trials * len(section.searched)
        return before.model_copy(
            update={
                "strategy": "evolution",
                "trials": trials + (before.trials if section.evolution.warm_start else 0),
                "merges": before.merges,
                "intent": f"search the coefficients of {len(cluster.members)} models by CMA-ES, {trials} candidates"
                + (", from what a greedy search finds" if section.evolution.warm_start else ""),
            }
        )

    def carry_out(self, plan: MergePlan, workbench: Workbench) -> MergeOutcome:
        """Search with each operator; of what they find the best on the proxy split is kept."""
        scores = workbench.scores(plan.members)
        trials: list[Trial] = []
        found: list[Growth] = []
        for operator in plan.operators:
            best = max(plan.members, key=lambda name: scores[name].mean)
            start = Growth(operator=operator, sources=(best,), scores=scores[best])
            if workbench.section.evolution.warm_start:
                start = coefficient.search(operator, plan, scores, workbench, trials)
            space = _Space(operator, plan.members, workbench.section)
            found.append(start)
            for generation, standings in enumerate(self._generations(space, start, plan, workbench), start=1):
                trial, winner = decide(standings, found[-1].scores, workbench, f"in generation {generation}")
                trials.append(trial)
                if winner is not None and winner.scores is not None:
                    sources = space.sources(winner.step)
                    found.append(Growth(operator, sources, winner.scores, winner.step))
        return settle(plan, [one for one in found if one.step], trials, workbench)

    def _generations(
        self, space: "_Space", start: Growth, plan: MergePlan, workbench: Workbench
    ) -> Iterator[list[Standing]]:
        import numpy as np
        from cmaes import CMA

        section = workbench.section.evolution
        bounds = np.array(space.bounds)
        search = CMA(
            mean=np.array(space.start(start)),
            sigma=STEP,
            cov=np.diag((bounds[:, 1] - bounds[:, 0]) ** 2),
            bounds=bounds,
            seed=workbench.section.seed + 1,  # 0 is none to it
            population_size=section.population or 4 + int(3 * log(len(bounds))),
        )
        left, generation = section.trials, 0
        while left > 0 and not search.should_stop():
            generation += 1
            points = [search.ask().round(DIGITS) for _ in range(search.population_size)]
            name = f"{plan.cluster}-{space.operator}-g{generation}".replace("_", "-")
            steps = [space.step([float(value) for value in point], name) for point in points]
            message = f"{space.operator}: generation {generation}, {left} trials left"
            standings = workbench.race(steps, start.scores, message)
            left -= len(points)
            search.tell([(point, -_value(one, start)) for point, one in zip(points, standings, strict=True)])
            yield standings


def _value(standing: Standing, start: Growth) -> float:
    """Return how far a candidate is ahead of the start, on the items it was scored on."""
    return -WORST if standing.scores is None else paired_gain(standing.scores, start.scores).mean


class _Space:
    """What is searched: a vector of numbers, and the step that it stands for."""

    def __init__(self, operator: str, members: tuple[str, ...], section: MergeSection) -> None:
        self.operator, self.members = operator, members
        kind: Operator = OPERATORS.get(operator)
        groups = section.evolution.layer_groups
        self.groups = 1 if groups == 1 else groups + 1  # and one for what is in no layer
        if kind.most is not None and len(members) > kind.most:
            raise MergeError(f"operator '{operator}' takes {kind.most} models at a time; evolution blends all at once")
        self.searched: dict[str, Parameter] = {}
        for key in dict.fromkeys([*([kind.coefficient] if kind.coefficient else []), *section.evolution.search]):
            if key not in kind.searchable():
                has = ", ".join(kind.searchable()) or "none"
                raise MergeError(f"operator '{operator}' has no parameter '{key}' to be searched (it has: {has})")
            self.searched[key] = kind.parameters[key]
        self.coefficient = kind.coefficient
        self.bounds = [
            parameter.search or (0.0, 1.0) for key, parameter in self.searched.items() for _ in range(self._width(key))
        ]
        if len(self.bounds) < 2:
            raise MergeError(f"operator '{operator}' has too little to search by evolution; use strategy 'coefficient'")

    def _width(self, key: str) -> int:
        if key != self.coefficient:
            return 1
        return self.groups * (len(self.members) if self.searched[key].per_input else 1)

    def start(self, growth: Growth) -> list[float]:
        """Return the vector of a merge that was found before."""
        values: list[float] = []
        for key, parameter in self.searched.items():
            low, high = parameter.search or (0.0, 1.0)
            if key == self.coefficient and parameter.per_input:
                known = growth.weights or dict.fromkeys(growth.sources, 1.0)
                for name in self.members:
                    values += [min(max(known.get(name, 0.0), low), high)] * self.groups
            else:
                values += [min(max(float(parameter.default), low), high)] * self._width(key)
        return values

    def step(self, point: list[float], name: str) -> MergeStep:
        """Return the candidate that a vector stands for."""
        parameters: dict[str, float | bool | list[float | list[float]]] = {}
        place = 0
        for key, parameter in self.searched.items():
            part = point[place : place + self._width(key)]
            place += len(part)
            if key != self.coefficient:
                parameters[key] = part[0]
            elif parameter.per_input:
                each = [part[start : start + self.groups] for start in range(0, len(part), self.groups)]
                parameters[key] = [one[0] if self.groups == 1 else list(one) for one in each]
            else:
                parameters[key] = part[0] if self.groups == 1 else list(part)
        return MergeStep(name=name, operator=self.operator, inputs=self.members, parameters=parameters)

    def sources(self, step: MergeStep) -> tuple[str, ...]:
        """Return the members that count for anything in a candidate."""
        value = step.parameters.get(str(self.coefficient))
        if not isinstance(value, list) or len(value) != len(self.members):
            return self.members
        return tuple(
            name for name, one in zip(self.members, value, strict=True) if (any(one) if isinstance(one, list) else one)
        )


strategy = Evolution()
