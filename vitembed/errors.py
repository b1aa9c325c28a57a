"""The exceptions that vitembed raises on purpose.

    VitembedError
    ├── ImageError            an image cannot be read or used
    ├── DataError             a data set, table or list of pairs cannot be used
    ├── ConfigError           a setting is unknown, mistyped or out of range
    ├── CheckpointError       a saved model is missing, damaged or of another kind
    ├── TrainingError         training cannot go on, or would overwrite an earlier model
    ├── VectorError           vectors have the wrong shape, type or values
    ├── SearchIndexError      an index is missing, damaged, locked or of another format
    ├── VerifierError         a verifier is missing, damaged, or its data cannot support the wanted error rate
    ├── ModelMismatchError    embeddings of one model meet an index or verifier of another
    └── MissingExtraError     a feature needs a package that is not installed (also an ImportError)

Every message says what was expected, what came and what to do, in one line: the command line prints it as it is.
Anything else that escapes from vitembed is a bug.
"""

import difflib
from collections.abc import Iterable


class VitembedError(Exception):
    """Base class: catch it to catch every error that vitembed raises on purpose."""


class ImageError(VitembedError):
    """An image cannot be read or used.

    Attributes:
        source: the path, or a short description of what was passed.
        reason: what is wrong with it, without the path.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        # The default would call ImageError(message) when a worker process sends the error back.
        return ImageError, (self.source, self.reason)


class DataError(VitembedError):
    """A data set, table or list of pairs cannot be used."""


class ConfigError(VitembedError, ValueError):
    """A setting is unknown, mistyped or out of range."""


class CheckpointError(VitembedError):
    """A saved model is missing, damaged or of another kind."""


class TrainingError(VitembedError):
    """Training cannot go on, or would overwrite an earlier model."""


class VectorError(VitembedError, ValueError):
    """Vectors have the wrong shape, type or values."""


class SearchIndexError(VitembedError):
    """An index is missing, damaged, locked or of another format."""


class VerifierError(VitembedError):
    """A verifier is missing or damaged, or its data cannot support the wanted error rate."""


class ModelMismatchError(VitembedError):
    """Embeddings of one model meet an index or verifier of another."""


class MissingExtraError(VitembedError, ImportError):
    """A feature needs a package that is not installed.

    Args:
        feature: what was asked for.
        extra: the extra of vitembed that brings the package.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra package: pip install 'vitembed[{extra}]'")
        self.extra = extra

    def __reduce__(self) -> tuple[object, ...]:
        return (Exception.__new__, (type(self), *self.args), self.__dict__)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not one of `known`, with the nearest of them.

    >>> print(unknown_name("mining", "semi_hard", ["all", "hard", "semihard"]))
    unknown mining 'semi_hard'; did you mean 'semihard'? Known: all, hard, semihard
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return ConfigError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")
