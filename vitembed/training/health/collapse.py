"""The collapse doctor: says, while a training runs, that it fails, by which cause, and what to do.

A look is the `Signals` of one step. Every cause in `vitembed.training.health.causes` has a sign that a look shows or
not, and a count that a look with the sign raises by one and a look without it lowers by one, down to 0: noise of single
batches delays, it does not hide. A cause is told when its count reaches the doctor's patience, or a stated multiple of
that, and told again only after its count was back at 0. NaN and infinity are told at once. A fatal cause means that
continuing is useless; some causes are first told as a warning, and as fatal when they last.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitembed.errors import CheckpointError, ConfigError
from vitembed.training.health.causes import AT_MARGIN, NEAR, TABLE, Cause, LossTraits, Past
from vitembed.training.health.signals import Signals

CAUSES = ("not-finite", *dict.fromkeys(cause.name for cause in TABLE))  # the words that a diagnosis can have


@dataclass(frozen=True)
class Diagnosis:
    """Why a training fails; `str` is one line.

    Attributes:
        cause: one of `CAUSES`, such as "equal-distances".
        evidence: the step, and what was measured there.
        advice: what to do.
        fatal: whether continuing is useless.
    """

    cause: str
    evidence: str
    advice: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.cause}: {self.evidence}; {self.advice}"


class CollapseDoctor:
    """Looks at a training now and then, and says what is wrong with it.

    Args:
        margin: of the loss, in units of distance; None if it has none.
        needs_pairs: whether the loss compares the images of a batch with each other alone: not so with logits, with
            proxies, or with a memory of earlier batches.
        patience: how many looks a sign must last; 15 looks, one every 10 steps, are 150 steps.

    Raises:
        ConfigError: if patience is below 1 or the margin is not finite.
    """

    def __init__(self, *, margin: float | None = None, needs_pairs: bool = True, patience: int = 15) -> None:
        if patience < 1:
            raise ConfigError(f"patience is a number of looks and must be at least 1; got {patience}")
        if margin is not None and not math.isfinite(margin):
            raise ConfigError(f"margin must be a finite number, or None for a loss without; got {margin}")
        self._loss = LossTraits(margin, needs_pairs)
        self._patience = patience
        self._past = Past()
        self._counts: dict[str, int] = {}
        self._told: set[str] = set()

    @classmethod
    def of_loss(cls, loss: object, *, patience: int = 15) -> "CollapseDoctor":
        """Return a doctor for trainings with a loss, of which it learns margin and kind.

        A margin is believed where the loss leaves an `active_share`, as ours do: elsewhere it may be an angle or a
        cosine. A loss with parameters of its own has proxies.
        """
        logits = bool(getattr(loss, "needs_logits", False))
        proxies = isinstance(loss, nn.Module) and any(True for _ in loss.parameters())
        margin = getattr(loss, "margin", getattr(loss, "negative_margin", None))
        known = hasattr(loss, "active_share") and isinstance(margin, int | float)
        alone = getattr(loss, "needs_pairs", True)
        return cls(margin=margin if known else None, needs_pairs=alone and not (logits or proxies), patience=patience)

    def observe(self, step: int, signals: Signals) -> Diagnosis | None:
        """Look at a step and return what is to be told now, None if there is nothing.

        Where several causes are due at once, the others are told at the next looks.

        Args:
            step: its number, which the diagnosis names.
            signals: what was measured.
        """
        if broken := _not_finite(step, signals):
            return broken
        self._past.begin(signals)
        due = [cause for cause in TABLE if self._is_due(cause, signals)]
        told = None
        if due:
            self._told.add(due[0].key)
            evidence = f"at step {step} {due[0].evidence(signals, self._past, self._loss)}"
            told = Diagnosis(due[0].name, evidence, due[0].advice, due[0].fatal)
        self._past.end(signals)
        return told

    def conclude(self, loss: float, positive_distance: float, negative_distance: float) -> Diagnosis | None:
        """Judge a training that is over, too short for the patience of `observe` perhaps, by its last epoch.

        Args:
            loss: the epoch's mean.
            positive_distance: of images of one class, the epoch's mean.
            negative_distance: of images of two classes.

        Returns:
            That the loss ended at the margin, if it did and was not told before; else None.
        """
        margin = self._loss.margin
        if not margin or (self._counts.get(AT_MARGIN.key, 0) and AT_MARGIN.key in self._told):
            return None
        if negative_distance - positive_distance >= NEAR * margin or loss <= (1 - NEAR) * margin:
            return None
        evidence = (
            f"in the last epoch the loss {loss:.4g} was at the margin {margin:g}: distance of positives "
            f"{positive_distance:.3g}, of negatives {negative_distance:.3g}"
        )
        return Diagnosis(AT_MARGIN.name, evidence, f"train longer; {AT_MARGIN.advice}", fatal=False)

    def _is_due(self, cause: Cause, now: Signals) -> bool:
        """Count a look; tell whether the cause shows, has lasted long enough, and was not told yet."""
        limit = max(1, round(cause.patience * self._patience))
        shows = cause.shows(now, self._past, self._loss)
        before = self._counts.get(cause.key, 0)
        count = min(before + 1, limit) if shows else max(before - 1, 0)
        self._counts[cause.key] = count
        if count == 0:
            self._told.discard(cause.key)
        return shows and count == limit and cause.key not in self._told

    def state_dict(self) -> dict[str, Any]:
        """Return all that the doctor remembers, as JSON types; one of the same settings can go on from there."""
        return {"past": dataclasses.asdict(self._past), "counts": dict(self._counts), "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another doctor remembered.

        Raises:
            CheckpointError: if it is not the state of a doctor of this version.
        """
        try:
            past = Past(**state["past"])
            counts = {str(key): int(count) for key, count in state["counts"].items()}
            told = {str(key) for key in state["told"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is not the state of a collapse doctor of this version: {error!r}") from error
        if unknown := sorted((counts.keys() | told) - {cause.key for cause in TABLE}):
            raise CheckpointError(f"the collapse doctor of this version does not know {', '.join(unknown)}")
        self._past, self._counts, self._told = past, counts, told


def _not_finite(step: int, now: Signals) -> Diagnosis | None:
    """Return what is to be told of NaN or infinity, naming where it came up first."""
    if not math.isfinite(now.spread):
        what, advice = "embeddings", "the weights are broken: go back to a checkpoint and lower the learning rate"
    elif not math.isfinite(now.loss):
        what, advice = "loss", "the embeddings are finite, so look at the loss, its settings and the labels"
    elif now.gradient is not None and not math.isfinite(now.gradient):
        what, advice = "gradient", "the loss is finite, so its derivative is not: look for a root or logarithm of 0"
    else:
        return None
    figures = f"loss {now.loss:.4g}" + ("" if now.gradient is None else f", gradient {now.gradient:.4g}")
    evidence = f"at step {step} the {what} had NaN or infinite values ({figures})"
    return Diagnosis("not-finite", evidence, f"{advice}; in fp16 or bf16 try fp32", fatal=True)
