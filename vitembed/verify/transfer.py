"""`transfer`: a verifier for a model that has seen all the data there is, from a sister model that has not.

A threshold needs identities that its model was not trained on. A model that is to be used by others is best trained on
all of them, and then none are left. So a sister, trained by the same command without some identities, is judged on
those, and lends its threshold. That the rates hold for the other model, too, is an assumption, and is written down as
one.
"""

from dataclasses import replace

from vitembed.errors import ConfigError, VerifierError
from vitembed.verify.verifier import Encoder, Verifier


def transfer(verifier: Verifier, model: Encoder, reason: str, *, location: str | None = None) -> Verifier:
    """Return a verifier for another model than the one whose scores were calibrated, its protocol saying so.

    Threshold, rates, intervals and curves stay as they are: all of them are those of the first model's scores.

    Args:
        verifier: fitted on the sister's scores; its calibration for references, if there is one, goes along.
        model: that will make the scores from now on, with embeddings of the same meaning.
        reason: why the rates should hold for it, in words that fit after "measured with another model, ".
        location: where that model can be found again, kept for people.

    Raises:
        VerifierError: the verifier does not say whose scores it was fitted on, or they are this model's own.
        ConfigError: the reason is empty or has several lines.
    """
    if verifier.fingerprint is None:
        raise VerifierError("this verifier does not say on whose scores it was fitted; fit it with its model")
    if verifier.fingerprint == model.fingerprint:
        raise VerifierError("this verifier was fitted on this very model's scores; use it as it is")
    if not reason.strip() or "\n" in reason:
        raise ConfigError(f"the reason must be one line of words; got {reason!r}")
    note = (
        f"; measured with another model, {reason.strip()} ({verifier.fingerprint}): that the rates hold for this one, "
        "too, is assumed"
    )
    calibration = replace(verifier.calibration, protocol=verifier.calibration.protocol + note)
    references = verifier.references
    if references is not None:
        theirs = replace(references.calibration, protocol=references.calibration.protocol + note)
        references = replace(references, calibration=theirs, protocol=references.protocol + note)
    return replace(
        verifier,
        calibration=calibration,
        fingerprint=model.fingerprint,
        location=location,
        model=model,
        references=references,
    )
