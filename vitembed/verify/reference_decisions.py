"""What enrolling, verifying by references and identifying answer, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass

from vitembed.verify.calibration import Verdict


@dataclass(frozen=True)
class EnrolmentReport:
    """What `Enrolment.enroll` did.

    Attributes:
        identity: whose references they are.
        added: the images that are references now, by path or as "image 3".
        known: those whose content was a reference of this identity already.
        problems: of each image that a person should look at again, what is wrong with it; it was enrolled all the same.
        references: how many the identity has now.
    """

    identity: str
    added: tuple[str, ...]
    known: tuple[str, ...]
    problems: Mapping[str, tuple[str, ...]]
    references: int


@dataclass(frozen=True)
class ReferenceDecision:
    """The answer to whether a questioned image shows an identity.

    Attributes:
        identity: whose references it was compared with.
        match: whether score >= threshold.
        verdict: "match", "no match" or "unsure".
        probability: that it matches, in [0, 1], at the calibration's prior.
        score: of `rule`; no cosine where the rule is fitted.
        threshold: of the same rule.
        rule: how the cosines with the references became one score.
        cosines: with each reference, in [-1, 1], in the order of `references`.
        references: where the images of the references were; None for those that came from memory.
        notes: what a reader must know before trusting it, a sentence each.
    """

    identity: str
    match: bool
    verdict: Verdict
    probability: float
    score: float
    threshold: float
    rule: str
    cosines: tuple[float, ...]
    references: tuple[str | None, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identification:
    """The answer to who of all enrolled identities a questioned image shows, if any.

    An image of nobody enrolled is taken for somebody with a probability of at most 1 - (1 - far)^compared, the
    false-positive identification rate of ISO/IEC 19795-1: each comparison is a chance to err, and chances that rise
    together err together less often than independent ones.

    Attributes:
        best: the identity of the best candidate where it matches; None otherwise.
        verdict: that of the best candidate.
        candidates: the decisions for the k identities that score highest, best first, by the threshold below; only the
            first one has notes.
        compared: how many identities were compared.
        threshold: for one comparison among so many.
        far: the false-accept rate of one comparison at this threshold, for random non-matches.
        false_positive_rate: the bound above.
        notes: as in `ReferenceDecision`.
    """

    best: str | None
    verdict: Verdict
    candidates: tuple[ReferenceDecision, ...]
    compared: int
    threshold: float
    far: float
    false_positive_rate: float
    notes: tuple[str, ...] = ()
