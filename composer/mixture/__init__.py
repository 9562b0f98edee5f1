"""The mixture: merged models and loners as experts behind one router.

Doors: `choose_experts`, `build_composite`; `load_router` for whoever serves it.
"""

from composer.mixture.build import build_composite, choose_experts, load_router
from composer.mixture.composite import MANIFEST, Composite, Expert
from composer.mixture.routing import Known

__all__ = ["MANIFEST", "Composite", "Expert", "Known", "build_composite", "choose_experts", "load_router"]
