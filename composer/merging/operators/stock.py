"""The merge operators of mergekit, with defaults that do something and ranges that are worth searching."""

from composer.merging.operators.operator import Operator, Parameter

_KERNELS = "composer.merging.engine.kernels:"


def _weight(default: float, search: tuple[float, float] = (0.0, 1.0)) -> Parameter:
    return Parameter(default, "how much of each input", search=search, per_input=True)


def _density(default: float) -> Parameter:
    return Parameter(default, "share of each task vector that is kept", 0, 1, (0.1, 1.0), True, open_low=True)


_LAMBDA = Parameter(1.0, "scale of the merged task vector", search=(0.3, 1.5))


def _normalize(default: bool) -> Parameter:
    return Parameter(default, "divide by the sum of the weights")


def _rescale(default: bool) -> Parameter:
    return Parameter(default, "scale what is kept of a task vector up to the L1 norm it had")


def _task_vectors(
    method: str, summary: str, source: str, weight: float, *, normalize: bool = False, **more: Parameter
) -> Operator:
    """Return an operator of the task-vector family: base + lambda × combination of sparsified task vectors."""
    return Operator(
        summary,
        source,
        _KERNELS + "task_vectors",
        {"weight": _weight(weight), **more, "normalize": _normalize(normalize), "lambda": _LAMBDA},
        start="base",
        least=1 if not more else 2,
        method=method,
        coefficient="weight",
        scaled=True,
        linear=not more,
        random=method.startswith(("dare", "della")),
    )


_EPSILON = Parameter(0.15, "how far the keep probability moves with the rank", 0, 1, per_input=True)
_GAMMA = Parameter(0.01, "share of the largest changes that is dropped too", 0, 1, (0.0, 0.1), True)

STOCK: dict[str, Operator] = {
    "linear": Operator(
        "weighted mean",
        "arXiv 2203.05482",
        _KERNELS + "linear",
        {"weight": _weight(1.0), "normalize": _normalize(True)},
        method="linear",
        coefficient="weight",
        normalised="normalize",
        linear=True,
    ),
    "slerp": Operator(
        "spherical interpolation of two models",
        "Shoemake 1985",
        _KERNELS + "slerp",
        {"t": Parameter(0.5, "place between the first (0) and the second (1)", 0, 1, (0.0, 1.0))},
        start="first",
        most=2,
        method="slerp",
        coefficient="t",
    ),
    "nuslerp": Operator(
        "spherical interpolation of two models (or of their task vectors), by weights",
        "mergekit",
        _KERNELS + "whole",
        {
            "weight": _weight(0.5),
            "nuslerp_flatten": Parameter(True, "take each tensor as one vector"),
            "nuslerp_row_wise": Parameter(False, "without flattening: along rows instead of columns"),
            "from_base": Parameter(False, "interpolate task vectors instead of weights"),
        },
        most=2,
        method="nuslerp",
        coefficient="weight",
        normalised="always",
    ),
    "multislerp": Operator(
        "barycentre of any number of models (or of their task vectors) on a sphere",
        "mergekit",
        _KERNELS + "whole",
        {
            "weight": _weight(1.0),
            "normalize_weights": _normalize(True),
            "from_base": Parameter(False, "interpolate task vectors instead of weights"),
        },
        method="multislerp",
        coefficient="weight",
        normalised="normalize_weights",
    ),
    "karcher": Operator(
        "Karcher mean on a sphere, all inputs alike",
        "arXiv 2603.04972",
        _KERNELS + "whole",
        {
            "max_iter": Parameter(10, "iterations at most", 1),
            "tol": Parameter(1e-5, "stop when the mean moves less", 0, open_low=True),
        },
        method="karcher",
    ),
    "task_arithmetic": _task_vectors("task_arithmetic", "base plus weighted task vectors", "arXiv 2212.04089", 0.4),
    "ties": _task_vectors(
        "ties",
        "trimmed task vectors with elected signs",
        "arXiv 2306.01708",
        1.0,
        normalize=True,
        density=_density(0.3),
        rescale=_rescale(False),
    ),
    "dare_linear": _task_vectors(
        "dare_linear",
        "randomly dropped and rescaled task vectors",
        "arXiv 2311.03099",
        0.4,
        density=_density(0.5),
        rescale=_rescale(True),
    ),
    "dare_ties": _task_vectors(
        "dare_ties",
        "randomly dropped and rescaled task vectors with elected signs",
        "arXiv 2311.03099",
        0.4,
        density=_density(0.5),
        rescale=_rescale(True),
    ),
    "della_linear": _task_vectors(
        "della_linear",
        "task vectors dropped at random, small changes more often",
        "arXiv 2406.11617",
        0.4,
        density=_density(0.5),
        epsilon=_EPSILON,
        rescale=_rescale(True),
    ),
    "della": _task_vectors(
        "della",
        "task vectors dropped at random, small changes more often, with elected signs",
        "arXiv 2406.11617",
        1.0,
        normalize=True,
        density=_density(0.5),
        epsilon=_EPSILON,
        rescale=_rescale(True),
    ),
    "breadcrumbs": _task_vectors(
        "breadcrumbs",
        "task vectors without their smallest and their largest changes",
        "arXiv 2312.06795",
        0.4,
        density=_density(0.7),
        gamma=_GAMMA,
        rescale=_rescale(False),
    ),
    "breadcrumbs_ties": _task_vectors(
        "breadcrumbs_ties",
        "task vectors without their smallest and their largest changes, with elected signs",
        "arXiv 2312.06795",
        0.4,
        density=_density(0.7),
        gamma=_GAMMA,
        rescale=_rescale(False),
    ),
    "model_stock": Operator(
        "interpolation between base and mean by the angle between task vectors",
        "arXiv 2403.19522",
        _KERNELS + "whole",
        {"filter_wise": Parameter(False, "an angle for each row instead of each tensor")},
        start="base",
        method="model_stock",
    ),
    "nearswap": Operator(
        "the second model where it is close to the first",
        "mergekit",
        _KERNELS + "whole",
        {
            "t": Parameter(
                0.001, "distance up to which a weight is taken over whole", 0, None, (0.0, 0.01), open_low=True
            )
        },
        start="first",
        most=2,
        method="nearswap",
        coefficient="t",
    ),
    "arcee_fusion": Operator(
        "the changes of the second model that matter most, brought into the first",
        "mergekit",
        _KERNELS + "whole",
        start="first",
        most=2,
        method="arcee_fusion",
        random=True,
    ),
    "sce": Operator(
        "task vectors weighed by their energy, with elected signs",
        "arXiv 2408.07990",
        _KERNELS + "whole",
        {
            "select_topk": Parameter(
                0.5, "share of positions that is kept, by variance", 0, 1, (0.1, 1.0), open_low=True
            )
        },
        start="base",
        method="sce",
    ),
    "ram": Operator(
        "changes made by one model kept whole, shared ones averaged",
        "arXiv 2601.13572",
        _KERNELS + "whole",
        {"epsilon": Parameter(1e-5, "a change smaller than this is none", 0)},
        start="base",
        method="ram",
    ),
    "ramplus_tl": Operator(
        "as ram, with the changes of one model scaled up by how much it shares",
        "arXiv 2601.13572",
        _KERNELS + "whole",
        {
            "r": Parameter(0.1, "strength of the scaling", 0, None, (0.0, 0.5)),
            "alpha": Parameter(0.2, "most that sharing counts", 0, None, (0.0, 1.0)),
            "epsilon": Parameter(1e-5, "a change smaller than this is none", 0),
        },
        start="base",
        method="ramplus_tl",
    ),
    "passthrough": Operator(
        "layers of several models stacked on one another",
        "mergekit",
        _KERNELS + "copy",
        {
            "first": Parameter(0, "first layer taken from each input, counted from 0", 0, per_input=True),
            "last": Parameter(-1, "layer after the last one taken; -1 for all", -1, per_input=True),
        },
        least=1,
        method="passthrough",
    ),
}
