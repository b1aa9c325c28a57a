"""`Enrolment`: identities with their reference images, and decisions about questioned images.

The references are stored in an index (see `vitembed.verify.reference_store`): embeddings, no images. A call of `enroll`
is one transaction: after a crash, or an image that cannot be read, all of its references are there or none. A reference
whose file has gone still decides; only the comparison of its ink is left out.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from vitembed.errors import ConfigError, DataError, ImageError, VerifierError
from vitembed.images import ImageSource
from vitembed.index import Index
from vitembed.verify.calibration import Calibration
from vitembed.verify.quality import reads_ink, require_ink
from vitembed.verify.reference_decisions import EnrolmentReport, Identification, ReferenceDecision
from vitembed.verify.reference_rules import Evidence, Mean, Rule, gather_evidence
from vitembed.verify.reference_store import References, ReferenceStore, Vectors, checked_identity, content_hash
from vitembed.verify.reference_trials import cosines
from vitembed.verify.verifier import Encoder, Verifier

# From this cosine on two images are the same to the model: encoding one file twice gives 1 - 1e-6.
_SAME_TO_THE_MODEL = 1 - 1e-5

_OF_PAIRS = (
    "The verifier was calibrated on pairs, not on references: the mean cosine with the references is judged as if it "
    "were that of one pair, and its error rates are not known."
)


class Enrolment:
    """Identities with their references, and decisions by a verifier.

    Args:
        verifier: with its model, but for `identities`, `references` and `remove`. Its `references` calibration
            decides; where it has none, the mean cosine is judged as if it were the score of a pair, and a note says so.
        index: an open index of references alone, or the path of one, which the first `enroll` makes.

    Attributes:
        verifier: as above.
        path: of the index.

    Raises:
        SearchIndexError: there is something else at the path.
        ModelMismatchError: the references were embedded by another model.
    """

    def __init__(self, verifier: Verifier, index: Index | str | os.PathLike[str]) -> None:
        model = verifier.model
        fingerprint = verifier.fingerprint or (None if model is None else model.fingerprint)
        given = index if isinstance(index, Index) else None
        self.verifier = verifier
        self.path = index.path if isinstance(index, Index) else Path(index)
        self._store = ReferenceStore(self.path, given, fingerprint, verifier.location)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verifier: Verifier) -> Self:
        """Open the references in a folder, which the first `enroll` makes; a context manager closes them.

        Raises:
            SearchIndexError: there is something else at `path`.
            ModelMismatchError: the references were embedded by another model.
        """
        return cls(verifier, path)

    def close(self) -> None:
        """Close the index, unless it was handed over open; closing twice does nothing."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Who is enrolled

    def identities(self) -> dict[str, int]:
        """Return the number of references of each identity, in the order of their names.

        Raises:
            SearchIndexError: the index holds something else.
        """
        return self._store.identities()

    def references(self, identity: str) -> tuple[Path | None, ...]:
        """Return where the images of an identity's references were, in the order of enrolment; None: from memory.

        Raises:
            DataError: the identity is not enrolled.
        """
        paths = self._store.get(checked_identity(identity)).paths
        return tuple(None if path is None else Path(path) for path in paths)

    def enroll(
        self, identity: str, images: Sequence[ImageSource], *, batch_size: int = 64, progress: bool = False
    ) -> EnrolmentReport:
        """Add references of an identity, all of them or none.

        An image whose content is a reference of the identity already is left as it is.

        Args:
            identity: its name, 1 to 1,000 bytes of UTF-8 without control characters or spaces at its ends; letters that
                Unicode can write in two ways are made equal (form NFC).
            images: one or more.
            batch_size: images in one pass of the network.
            progress: show a progress bar on standard error.

        Raises:
            DataError: the name is not as above, or there is no image.
            ImageError: an image cannot be read, or is blank where the model reads ink.
            VerifierError: the verifier has no model.
            SearchIndexError: another process is writing, or the disk is full.
        """
        name = checked_identity(identity)
        if isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Sequence):
            raise DataError(f"enrolling {name!r} needs a list of images; got {type(images).__name__}")
        if not len(images):
            raise DataError(f"enrolling {name!r} needs at least one image; got none")
        vectors = self._model().encode(list(images), batch_size=batch_size, progress=progress)
        hashes = [content_hash(image) for image in images]
        problems = self._problems_of_references(name, images, hashes)
        new, total = self._store.add(name, [_path_of(image) for image in images], hashes, vectors)
        shown = [_name_of(image, position) for position, image in enumerate(images)]
        return EnrolmentReport(
            name,
            tuple(shown[i] for i in new),
            tuple(text for i, text in enumerate(shown) if i not in new),
            {shown[i]: texts for i, texts in problems.items()},
            total,
        )

    def remove(self, identity: str) -> int:
        """Remove an identity with all of its references, and return how many they were.

        Raises:
            DataError: the identity is not enrolled.
            SearchIndexError: another process is writing, or the disk is full.
        """
        return self._store.remove(checked_identity(identity))

    # Decisions

    def verify(self, identity: str, image: ImageSource) -> ReferenceDecision:
        """Decide whether a questioned image shows an identity.

        Raises:
            DataError: the identity is not enrolled.
            ImageError: the image cannot be read, or is blank where the model reads ink.
            VerifierError: the verifier has no model.
        """
        name = checked_identity(identity)
        own = self._store.get(name)
        vector = self._model().encode([image], batch_size=1)
        return self._noted(image, own, self._decide(name, vector, own, self.calibration.threshold))

    def identify(self, image: ImageSource, k: int = 5) -> Identification:
        """Find whom a questioned image shows among all enrolled identities, or nobody.

        The threshold is that of the wanted false-accept rate divided by the number of identities (Bonferroni), where
        the data of the calibration support so low a rate; where they do not, a note says so.

        Args:
            image: the questioned image.
            k: how many candidates to return, at least 1.

        Raises:
            ConfigError: `k` is below 1.
            DataError: nobody is enrolled.
            ImageError: as in `verify`.
            VerifierError: the verifier has no model.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"k must be a whole number of at least 1; got {k!r}")
        everybody = self._store.everybody()
        if not everybody:
            raise DataError(f"nobody is enrolled in {self.path}; enrol first: vitembed enroll NAME IMAGE...")
        vector = self._model().encode([image], batch_size=1)
        threshold, far, supported = self._threshold_among(len(everybody))
        evidence = [self._evidence(vector, own) for own in everybody.values()]
        ranked = sorted(zip(-self.rule(Evidence.concatenate(evidence)), everybody, strict=True))
        decisions = [self._decide(name, vector, everybody[name], threshold) for _, name in ranked[:k]]
        first = self._noted(image, everybody[decisions[0].identity], decisions[0])
        return Identification(
            best=first.identity if first.match else None,
            verdict=first.verdict,
            candidates=(first, *decisions[1:]),
            compared=len(everybody),
            threshold=threshold,
            far=far,
            false_positive_rate=1 - (1 - far) ** len(everybody),
            notes=() if supported else (_unsupported(self.calibration.far_wanted, far, len(everybody)),),
        )

    @property
    def calibration(self) -> Calibration:
        """The calibration that decides: that of references, or of pairs where there is no other."""
        fitted = self.verifier.references
        return self.verifier.calibration if fitted is None else fitted.calibration

    @property
    def rule(self) -> Rule:
        """How cosines with the references become one score."""
        fitted = self.verifier.references
        return Mean() if fitted is None else fitted.rule

    def _decide(self, name: str, vector: Vectors, own: References, threshold: float) -> ReferenceDecision:
        """Return the decision for one vector (1, D), without notes."""
        score = float(self.rule(self._evidence(vector, own))[0])
        calibration = replace(self.calibration, threshold=threshold)
        return ReferenceDecision(
            identity=name,
            match=score >= threshold,
            verdict=calibration.verdict(score),
            probability=float(calibration.curve(score)),
            score=score,
            threshold=threshold,
            rule=self.rule.name,
            cosines=tuple(map(float, cosines(vector.astype(np.float64), own.vectors.astype(np.float64))[0])),
            references=own.paths,
        )

    @staticmethod
    def _evidence(vector: Vectors, own: References) -> Evidence:
        rows, references = vector.astype(np.float64), own.vectors.astype(np.float64)
        return gather_evidence(cosines(rows, references), cosines(references, references))

    def _threshold_among(self, identities: int) -> tuple[float, float, bool]:
        """Return threshold and false-accept rate of one comparison among many, and whether the wanted rate is kept."""
        wanted = self.calibration.far_wanted / identities
        fitted = self.verifier.references
        far, threshold = (
            (self.calibration.far_wanted, self.calibration.threshold)
            if fitted is None
            else fitted.threshold_for(wanted)
        )
        return threshold, far, far <= wanted * (1 + 1e-9)

    def _noted(self, image: ImageSource, own: References, decision: ReferenceDecision) -> ReferenceDecision:
        """Return the decision with what a reader must know of it."""
        notes = list(self._notes_on_image(image, own, decision.cosines))
        fitted, count = self.verifier.references, len(own)
        if fitted is None:
            notes.append(_OF_PAIRS)
        elif count != fitted.count:
            fewer = "fewer" if count < fitted.count else "more"
            many = "is 1 reference" if count == 1 else f"are {count} references"
            notes.append(f"There {many}, {fewer} than the {fitted.count} that the error rates were measured with.")
        return replace(decision, notes=tuple(notes))

    def _notes_on_image(self, image: ImageSource, own: References, with_each: Sequence[float]) -> tuple[str, ...]:
        mark = content_hash(image)
        if mark in own.hashes:
            return (f"The questioned image is itself a reference: {_shown(own.paths[own.hashes.index(mark)])}.",)
        notes = self._judged(image, _unchanged(own))
        alike = int(np.argmax(with_each))
        if not notes and with_each[alike] >= _SAME_TO_THE_MODEL:
            return (f"To the model it is the same picture as the reference {_shown(own.paths[alike])}: is it a copy?",)
        return notes

    # The quality gate

    def _judged(self, image: ImageSource, references: Sequence[str | None]) -> tuple[str, ...]:
        """Return what is wrong with an image of ink, compared with those references whose files are there.

        Raises:
            ImageError: it is blank.
        """
        if not reads_ink(getattr(self._model(), "preprocess", None)):
            return ()
        beside = [path for path in references if path is not None and Path(path).is_file()]
        problems = require_ink(image, beside).problems
        # The references are numbered by position in the list that was handed over; a person needs their names.
        return tuple(
            problem.text if problem.reference is None else f"{problem.text} ({beside[problem.reference]})"
            for problem in problems
        )

    def _problems_of_references(
        self, name: str, images: Sequence[ImageSource], hashes: Sequence[str]
    ) -> dict[int, tuple[str, ...]]:
        """Return what is wrong with new references, by their positions."""
        owners, own = self._store.owners(hashes), self._store.find(name)
        earlier: list[str | None] = [] if own is None else list(_unchanged(own))
        found: dict[int, tuple[str, ...]] = {}
        for position, (image, mark) in enumerate(zip(images, hashes, strict=True)):
            theirs = owners.get(mark, set())
            if name in theirs or mark in hashes[:position]:
                continue
            texts = self._judged(image, earlier)
            texts += tuple(f"The same image is a reference of {other!r}." for other in sorted(theirs))
            if texts:
                found[position] = texts
            earlier.append(_path_of(image))
        return found

    def _model(self) -> Encoder:
        if self.verifier.model is None:
            raise VerifierError("to embed images the verifier needs its model: Verifier.load(path, model)")
        return self.verifier.model


def _unchanged(own: References) -> list[str]:
    """Return where the references lie whose files still hold what was enrolled."""
    kept = []
    for path, mark in zip(own.paths, own.hashes, strict=True):
        try:
            if path is not None and content_hash(path) == mark:
                kept.append(path)
        except ImageError:
            continue
    return kept


def _path_of(image: ImageSource) -> str | None:
    return str(Path(image).absolute()) if isinstance(image, str | os.PathLike) else None


def _name_of(image: ImageSource, position: int | None = None) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return "the image" if position is None else f"image {position}"


def _shown(path: str | None) -> str:
    return "an image that came from memory" if path is None else path


def _unsupported(wanted: float, far: float, identities: int) -> str:
    return (
        f"The calibration supports no false-accept rate below {far:.2g} for one comparison: among {identities:,} "
        f"identities up to {1 - (1 - far) ** identities:.2%} of strangers are taken for somebody, not {wanted:.2%} as "
        "was asked for."
    )
