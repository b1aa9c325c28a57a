"""What of pytorch-metric-learning goes by name: its losses and miners, and the values that make sense for them.

The package checks few of its arguments: `type_of_triplets="semi_hard"` silently means "all", a margin of 0.5 for
`SphereFaceLoss` is rounded to 0, with a negative `neg_margin` a loss ignores all negatives. `ACCEPTED` has every
argument that a line of text can give, so that such a value is an error before anything is trained.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from vitembed.errors import ConfigError, MissingExtraError, unknown_name

# Classes that are no loss or miner for labelled batches, or cannot be trained with, and why not.
REFUSED = {
    "CrossBatchMemory": "it wraps another loss, which a line of text cannot hold; build it in Python instead",
    "MultipleLosses": "it wraps other losses, which a line of text cannot hold; build it in Python instead",
    "SelfSupervisedLoss": "it compares two views of unlabelled images, and a batch has one view and labels",
    "VICRegLoss": "it compares two views of unlabelled images, and a batch has one view and labels",
    "ManifoldLoss": "it takes no labels, and so cannot learn from classes",
    "DynamicSoftMarginLoss": "its histogram keeps the graph of the step before, so that a second step fails",
    "SmoothAPLoss": "it needs as many images of every class, and batches differ",
    "EmbeddingsAlreadyPackagedAsTriplets": "it needs batches of triplets, and gets batches of classes",
}


@dataclass(frozen=True)
class Accepted:
    """The values that an argument makes sense with.

    Attributes:
        interval: of finite numbers, as mathematics writes it: "(0, 1]" is above 0 and up to 1; empty for no number.
        words: words beside or in place of numbers.
        whole: whether the numbers are whole.
        pair: whether it takes two numbers, the smaller first.
    """

    interval: str = ""
    words: tuple[str, ...] = ()
    whole: bool = False
    pair: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, str):
            return value in self.words
        if self.pair:
            is_pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(self._holds, value))
            return is_pair and value[0] < value[1]  # type: ignore[index]
        return self._holds(value)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        numbers = f"a {kind} in {self.interval}" if self.interval else ""
        if self.pair:
            numbers = f"two numbers in {self.interval}, the smaller first"
        return " or ".join([*map(repr, self.words), *([numbers] if numbers else [])])

    def _holds(self, value: object) -> bool:
        """Tell whether a value is a number within the interval."""
        if not self.interval or isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        low, high = map(float, self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        return math.isfinite(value) and above and below


_COUNT = Accepted("[1, inf)", whole=True)
_POSITIVE = Accepted("(0, inf)")
_NOT_NEGATIVE = Accepted("[0, inf)")
_COSINE = Accepted("[-1, 1]")
_SHARE = Accepted("(0, 1]")
_RANGE = Accepted("[0, inf)", pair=True)
_STRATEGY = Accepted(words=("all", "easy", "hard", "semihard"))

# By argument, or by class and argument where classes differ. Angles are in degrees; distances are of unit rows.
ACCEPTED = {
    "allowed_neg_range": _RANGE,
    "allowed_pos_range": _RANGE,
    "alpha": _POSITIVE,
    "AngularLoss.alpha": Accepted("(0, 90)"),
    "angle": Accepted("(0, 90)"),
    "anneal": _POSITIVE,
    "b": _POSITIVE,
    "base": _COSINE,
    "beta": _POSITIVE,
    "centers_per_class": _COUNT,
    "cutoff": Accepted("(0, 2)"),
    "delta": Accepted("(0, 2]"),
    "descriptors_dim": _COUNT,
    "embedding_size": _COUNT,
    "epsilon": _NOT_NEGATIVE,
    "filter_percentage": _SHARE,
    "gamma": _POSITIVE,
    "imbalance": Accepted("[0, 1]"),
    "la": _POSITIVE,
    "lambda_minus": _NOT_NEGATIVE,
    "lambda_plus": _NOT_NEGATIVE,
    "m": Accepted("(-1, 1)"),
    "margin": _NOT_NEGATIVE,
    "ArcFaceLoss.margin": Accepted("[0, 180)"),
    "CosFaceLoss.margin": Accepted("[0, 2)"),
    "LargeMarginSoftmaxLoss.margin": _COUNT,
    "ProxyAnchorLoss.margin": _COSINE,
    "TupletMarginLoss.margin": Accepted("[0, 180)"),
    "margin_minus": _COSINE,
    "margin_plus": _COSINE,
    "min_val": Accepted("(-inf, -2]"),
    "momentum": _SHARE,
    "n_bins": _COUNT,
    "neg_eps": Accepted("[0, 1)"),
    "neg_margin": _POSITIVE,
    "neg_per_bin": _COUNT,
    "neg_strategy": _STRATEGY,
    "nonzero_loss_cutoff": Accepted("(0, 2]"),
    "nu": _NOT_NEGATIVE,
    "num_bins": _COUNT,
    "num_classes": _COUNT,
    "pos_eps": Accepted("[0, 1)"),
    "pos_margin": _NOT_NEGATIVE,
    "pos_per_bin": _COUNT,
    "pos_strategy": _STRATEGY,
    "scale": _POSITIVE,
    "softmax_scale": _POSITIVE,
    "sub_centers": _COUNT,
    "temperature": _POSITIVE,
    "Tn": _NOT_NEGATIVE,
    "Tp": _NOT_NEGATIVE,
    "triplets_per_anchor": Accepted("[1, inf)", words=("all",), whole=True),
    "type_of_triplets": _STRATEGY,
    "variant": Accepted(words=("Ds", "Dq", "Iu", "Ib", "O")),
}


def find_class(name: str, kind: str, own: Iterable[str]) -> type:
    """Return the loss or miner of pytorch-metric-learning that has a name.

    Args:
        name: of the class.
        kind: "loss" or "miner".
        own: the names of ours, for the error.

    Raises:
        ConfigError: there is none of this name, or it does not learn from labelled batches.
        MissingExtraError: pytorch-metric-learning is not installed.
    """
    if name.islower():  # classes have capitals: this was meant for one of our own, with or without the other package
        raise unknown_name(kind, name, own)
    if name in REFUSED:
        raise ConfigError(f"{name} is no {kind} to choose by name: {REFUSED[name]}")
    classes = peer_classes(kind, name)
    if name not in classes:
        raise unknown_name(kind, name, [*own, *classes])
    return classes[name]


def peer_classes(kind: str, wanted: str = "") -> dict[str, type]:
    """Return the classes of pytorch-metric-learning that go by name.

    Args:
        kind: "loss" or "miner".
        wanted: which one it is about, for the error.

    Raises:
        MissingExtraError: pytorch-metric-learning is not installed.
    """
    try:
        import pytorch_metric_learning.losses
        import pytorch_metric_learning.miners
    except ImportError as error:
        raise MissingExtraError(f"the {kind} {wanted}".rstrip(), "metric-learning") from error
    namespace: ModuleType = getattr(pytorch_metric_learning, {"loss": "losses", "miner": "miners"}[kind])
    return {
        name: value
        for name, value in vars(namespace).items()
        if isinstance(value, type)
        and not name.startswith(("Base", "Generic"))
        and not name.endswith("Mixin")
        and name not in REFUSED
    }


def check_argument(cls: type, parameter: inspect.Parameter, value: object) -> bool:
    """Refuse a value that makes no sense for an argument of pytorch-metric-learning.

    Args:
        cls: the class, for which arguments of its bases count as well.
        parameter: the argument.
        value: what it was given.

    Returns:
        Whether the argument is known here; of others, and of classes that are not the package's, only the type of the
        default tells something.

    Raises:
        ConfigError: the value makes no sense.
    """
    if not cls.__module__.startswith("pytorch_metric_learning."):
        return False
    keys = [*(f"{base.__name__}.{parameter.name}" for base in cls.__mro__), parameter.name]
    accepted = next((ACCEPTED[key] for key in keys if key in ACCEPTED), None)
    if accepted is None:
        return False
    if value in accepted or (value is None and parameter.default is None):
        return True
    if isinstance(value, str) and accepted.words:
        raise unknown_name(f"{parameter.name} of {cls.__name__}", value, accepted.words)
    raise ConfigError(f"{cls.__name__}: {parameter.name} must be {accepted}; got {value!r}")
