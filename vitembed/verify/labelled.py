"""`fit_labelled`: a verifier from labelled images, for pairs and for references, each image embedded once."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import DataError, VerifierError
from vitembed.images import ImageSource
from vitembed.verify.pairs import Pairs
from vitembed.verify.references import fit_references
from vitembed.verify.verifier import Encoder, Verifier


class _Embedded:
    """A model's embeddings of some images, made when the first are asked for, and handed out in its place."""

    def __init__(self, model: Encoder, images: Sequence[ImageSource], batch_size: int, progress: bool) -> None:
        self.fingerprint = model.fingerprint
        self._encode = partial(model.encode, images, batch_size=batch_size, progress=progress)
        self._places = {_key(image): place for place, image in enumerate(images)}

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """All embeddings (N, D)."""
        return self._encode()

    def encode(
        self, images: Sequence[ImageSource], *, batch_size: int = 64, progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the embeddings of some of the images."""
        return self.vectors[[self._places[_key(image)] for image in images]]


def fit_labelled(
    model: Encoder,
    images: Sequence[ImageSource],
    labels: ArrayLike,
    forgery_of: NDArray[np.int64] | None = None,
    far: float = 0.01,
    *,
    count: int = 6,
    frr: float | None = None,
    against: str | None = None,
    prior: float = 0.5,
    curve: str = "auto",
    test_identities: int | None = None,
    max_pairs: int = 100_000,
    location: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Verifier, str | None]:
    """Fit a verifier on labelled images: for two images, and for an image beside references of an identity.

    Args:
        model: encodes images; it was not trained on these identities.
        images: N images.
        labels: (N,) identities, numbers, or strings where there are no forgeries; that of a forgery is not read.
        forgery_of: (N,) the label that a skilled forgery imitates, -1 for genuine images; None if all are genuine.
        far: the wanted false-accept rate, in (0, 1).
        count: how many references an identity will have; 0 to fit none.
        frr: see `Verifier.fit`, as for `against`, `prior` and `curve`.
        against: see there.
        prior: see there.
        curve: see there.
        test_identities: see there; the intervals for references are for as many identities as these have.
        max_pairs: see `Pairs.from_labels`.
        location: where the model can be found again, kept for people.
        seed: of all that is drawn.
        batch_size: images in one pass of the network.
        progress: show a progress bar on standard error.

    Returns:
        The verifier, and why it has no calibration for references; None where it has one, or none was wanted.

    Raises:
        ConfigError: a setting is out of range or unknown; nothing is encoded then.
        ImageError: an image cannot be read.
        DataError: labels do not fit, or there are no pairs of both kinds.
        VerifierError: the pairs cannot support the wanted rates, or the scores tell nothing apart.
    """
    pairs = Pairs.from_labels(images, labels, forgery_of, max_pairs=max_pairs, seed=seed)
    embedded = _Embedded(model, images, batch_size, progress)
    verifier = Verifier.fit(
        embedded,
        pairs,
        far,
        frr=frr,
        against=against,
        prior=prior,
        curve=curve,
        test_identities=test_identities,
        location=location,
    )
    verifier = replace(verifier, model=model)
    if not count:
        return verifier, None
    try:
        fitted = fit_references(
            embedded.vectors,
            labels,
            forgery_of,
            count,
            far,
            frr,
            against=against,
            prior=prior,
            curve=curve,
            seed=seed,
        )
    except (DataError, VerifierError) as error:
        return verifier, str(error)
    return verifier.with_references(fitted), None


def _key(image: ImageSource) -> str | int:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
