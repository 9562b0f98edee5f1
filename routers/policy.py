"""The policy: how scores become a decision."""

from math import exp
from typing import Literal

from composer.value import Value

Scope = Literal["last", "first", "conversation"]
"""What of a chat is read: the last user message, the first one (a conversation then stays with one expert), or all."""


class Decision(Value):
    """Where one prompt goes, and how clear that was."""

    expert: str
    scores: dict[str, float]
    """One score per expert, as the router gives them."""
    confidence: float
    """Probability of the likeliest expert, 0..1."""
    margin: float
    """Difference between the best two scores."""
    reason: str
    """Why this expert, in a few words."""
    abstained: bool = False
    """Whether it was too unclear, so that the fallback answers."""


class Policy(Value):
    """Turns scores into a decision."""

    abstain_to: str
    """The expert that answers what is unclear."""
    threshold: float = 0.0
    """Below this probability of the likeliest expert, a prompt is unclear."""
    temperature: float = 1.0
    """Scores are divided by it before the softmax; calibrated, a probability is the share of prompts that are right."""
    weights: dict[str, float] = {}
    """Factors on the experts' probabilities, to send more or fewer prompts their way; 1 where none is given."""
    tie: float = 0.0
    """Experts whose probability is less than this behind the likeliest one's are as good."""
    costs: dict[str, float] = {}
    """What an answer costs, e.g. the number of parameters; of experts that are as good, the cheapest answers."""
    scope: Scope = "last"

    def probabilities(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the probability of each expert."""
        highest = max(scores.values())
        odds = {
            name: self.weights.get(name, 1.0) * exp((score - highest) / self.temperature)
            for name, score in scores.items()
        }
        total = sum(odds.values())
        return {name: one / total for name, one in odds.items()}

    def decide(self, scores: dict[str, float]) -> Decision:
        """Return the decision; of equal experts the first one wins."""
        chances = self.probabilities(scores)
        best = max(chances, key=lambda name: chances[name])
        expert, reason, abstained = best, "likeliest", False
        if chances[best] < self.threshold:
            expert, reason, abstained = self.abstain_to, f"unclear: below {self.threshold:g}", True
        elif self.tie:
            equal = [name for name, one in chances.items() if chances[best] - one < self.tie]
            cheapest = min(equal, key=lambda name: self.costs.get(name, 0.0))
            if self.costs.get(cheapest, 0.0) < self.costs.get(best, 0.0):
                expert, reason = cheapest, f"as likely as {best}, and cheaper"
        ranked = sorted(scores.values(), reverse=True)
        return Decision(
            expert=expert,
            scores=scores,
            confidence=chances[best],
            margin=ranked[0] - ranked[1] if len(ranked) > 1 else 0.0,
            reason=reason,
            abstained=abstained,
        )
