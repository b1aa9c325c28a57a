"""Cross-batch memory: a loss compares its batch with the embeddings of earlier ones, too.

Embeddings drift slowly in training, so those of a few hundred steps ago still tell where an image lies, and cost no
activations (Wang, Zhang, Huang and Scott 2020, arXiv:1912.06798). How slowly is measured here, not assumed: `drift`.

The memory is a ring of rows. All of it is in `state_dict()`, so that a restored training goes on as if never
interrupted; nothing here waits for the device.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitembed.errors import CheckpointError, ConfigError, VectorError
from vitembed.training.random_states import RandomStates

_TRIED = 8  # rows of the first batch on which a loss shows whether it takes references
_NOBODY = -1  # the position of an entry whose image is not known


class CrossBatchMemory(nn.Module):
    """loss(batch) + weight * loss(batch against the memory), the memory being the last embeddings of earlier batches.

    Algorithm 1 of the paper (arXiv:1912.06798) puts the batch into the queue first and compares with the queue alone.
    Here, as in the authors' programs, the batch's own loss stays and the memory's is added; and the batch enters the
    memory after the comparison, so that no image is ever compared with itself. What is in the memory is detached: only
    the batch gets a gradient.

    Args:
        loss: `loss(embeddings, labels, tuples, ref_emb=..., ref_labels=...)`, as pytorch-metric-learning has it.
        size: rows of the memory; of a larger batch the last rows are kept.
        miner: `miner(embeddings, labels, ref_emb, ref_labels)`, which chooses from the batch against the memory, and as
            `miner(embeddings, labels)` from the batch, where the caller has not; None for all.
        warmup: number of first calls in which the memory only fills, while embeddings still move fast.
        weight: of the memory's loss; above 0.

    Attributes:
        active_share: scalar, the larger of the batch's and the memory's share of non-zero terms; None where the loss
            knows none, or before the first call.
        batch_loss: scalar without graph, the last batch's own loss.
        memory_loss: scalar without graph and weight, the loss against the memory; None if there was none yet.
        drift: scalar, the mean Euclidean distance, in [0, 2], between images' directions now and at their latest entry
            in the memory; NaN where no image of the batch was there, None in a call without positions or memory. It
            is what the network's steps and the images' augmentation moved, together. (The paper has its square,
            section 3.2.)
        age: scalar, how many calls ago these entries were made, on average.
        takes_positions: says to the training loop that `forward` wants positions.

    Raises:
        ConfigError: a setting is out of range, or the loss takes no references: one of logits or of proxies.
    """

    takes_positions = True
    needs_pairs = False  # of the batch: the memory may bring them
    embeddings: Tensor
    labels: Tensor
    positions: Tensor
    steps: Tensor

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        size: int,
        miner: Callable[..., Sequence[Tensor]] | None = None,
        warmup: int = 0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check_settings(size, warmup, weight)
        _check_signature(loss)
        self.loss, self.miner = loss, miner
        self.size, self.warmup, self.weight = size, warmup, float(weight)
        self.register_buffer("embeddings", torch.empty(0, 0))  # (size, D) once D is known
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("positions", torch.full((size,), _NOBODY))
        self.register_buffer("steps", torch.zeros(size, dtype=torch.int64))  # the call that wrote an entry
        self._next, self._count, self._calls = 0, 0, 0  # numbers of the host, so that slicing waits for no device
        self._tried = False
        self.active_share: Tensor | None = None
        self.batch_loss: Tensor | None = None
        self.memory_loss: Tensor | None = None
        self.drift: Tensor | None = None
        self.age: Tensor | None = None

    @property
    def count(self) -> int:
        """Rows in the memory now, from 0 to `size`."""
        return self._count

    @property
    def margin(self) -> float | None:
        """The loss's margin; None where it has none."""
        return getattr(self.loss, "margin", None)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Sequence[Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar; in training mode and with gradients enabled the batch enters the memory.

        Args:
            embeddings: (B, D) floats.
            labels: (B,) integers.
            tuples: what a miner chose in the batch; for the batch's own loss.
            positions: (B,) integers, where in the data set the images are; with them `drift` and `age` are measured.
                -1 for an image that is not known.

        Raises:
            VectorError: the shapes do not fit each other or the memory.
            ConfigError: the loss or the miner takes no references after all.
        """
        self._check(embeddings, labels, positions)
        self._try_references(embeddings, labels)
        if tuples is None and self.miner is not None:
            tuples = self.miner(embeddings, labels)
        total = self.loss(embeddings, labels, tuples)
        self.batch_loss, share = total.detach(), _share(self.loss)
        self.drift = self.age = self.memory_loss = None
        if self._count and positions is not None:
            self._measure_drift(embeddings.detach(), positions)
        if self._count and self._calls >= self.warmup:
            against = self._against_memory(embeddings, labels)
            self.memory_loss = against.detach()
            total = total + self.weight * against
            share = _larger(share, _share(self.loss))
        self.active_share = share
        if self.training and torch.is_grad_enabled():
            self._enqueue(embeddings.detach(), labels, positions)
        return total

    def _against_memory(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        # A copy: the memory changes before anybody asks for the gradient of what it was.
        rows = self.embeddings[: self._count].to(embeddings, copy=True)
        classes = self.labels[: self._count].to(labels, copy=True)
        tuples = None if self.miner is None else self.miner(embeddings, labels, rows, classes)
        return self.loss(embeddings, labels, tuples, ref_emb=rows, ref_labels=classes)

    @torch.no_grad()
    def _measure_drift(self, embeddings: Tensor, positions: Tensor) -> None:
        """Compare the batch's directions with those of the same images' latest entries; O((B + size) log size)."""
        start = self._next if self._count == self.size else 0  # slot of the oldest entry
        held = self.positions[: self._count].to(positions).roll(-start)  # oldest first
        held, order = held.sort(stable=True)
        place = (torch.searchsorted(held, positions.contiguous(), right=True) - 1).clamp_(min=0)  # the latest of equals
        known = (held[place] == positions) & (positions != _NOBODY)
        slots = (order[place] + start) % self._count
        ages = self._calls - self.steps.to(slots.device)[slots]
        before = self.embeddings[slots.to(self.embeddings.device)].to(embeddings)
        apart = functional.normalize(embeddings.float()) - functional.normalize(before.float())
        self.drift = _mean(apart.norm(dim=1), known)
        self.age = _mean(ages.float(), known)

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor, labels: Tensor, positions: Tensor | None) -> None:
        """Write the batch over the oldest entries."""
        if positions is None:
            positions = torch.full_like(labels, _NOBODY)
        embeddings, labels, positions = (given[-self.size :] for given in (embeddings, labels, positions))
        if self.embeddings.numel() == 0:
            self.embeddings = embeddings.new_zeros(self.size, embeddings.shape[1])
        # The memory lives where its batches do; labels and positions may well be the host's.
        self.embeddings = self.embeddings.to(embeddings.device)
        self.labels = self.labels.to(labels.device)
        self.positions, self.steps = self.positions.to(positions.device), self.steps.to(positions.device)
        slots = (torch.arange(len(embeddings)) + self._next) % self.size
        self.embeddings[slots.to(embeddings.device)] = embeddings.to(self.embeddings.dtype)
        self.labels[slots.to(labels.device)] = labels.long()
        self.positions[slots.to(positions.device)] = positions.long()
        self.steps[slots.to(positions.device)] = self._calls
        self._next = (self._next + len(embeddings)) % self.size
        self._count = min(self._count + len(embeddings), self.size)
        self._calls += 1

    def _check(self, embeddings: Tensor, labels: Tensor, positions: Tensor | None) -> None:
        if embeddings.ndim != 2 or not embeddings.is_floating_point():
            raise VectorError(
                f"embeddings must be floating-point of shape (B, D); got {embeddings.dtype} of "
                f"{tuple(embeddings.shape)}"
            )
        if self.embeddings.numel() and embeddings.shape[1] != self.embeddings.shape[1]:
            raise VectorError(
                f"embeddings must be as wide as the memory's, {self.embeddings.shape[1]}; got {embeddings.shape[1]}"
            )
        for name, given in {"labels": labels, "positions": positions}.items():
            if given is None:
                continue
            if given.shape != embeddings.shape[:1] or given.is_floating_point() or given.dtype == torch.bool:
                raise VectorError(
                    f"{name} must be {len(embeddings)} integers, one for each embedding; got {given.dtype} of "
                    f"{tuple(given.shape)}"
                )

    def _try_references(self, embeddings: Tensor, labels: Tensor) -> None:
        """Find out at the first call, not after the warm-up, whether loss and miner compare with other rows.

        A copy of the loss is asked, and the random states are put back: a loss may count its calls or draw.
        """
        if self._tried:
            return
        rows, classes = embeddings.detach()[:_TRIED], labels[:_TRIED]
        references, their_classes = rows.repeat(2, 1), classes.repeat(2)  # the shapes differ, as they will
        state = RandomStates.now()
        with torch.no_grad():
            loss = copy.deepcopy(self.loss)
            loss(rows, classes, None)  # what is wrong with the batch is told as such
            try:
                tuples = self.miner(rows, classes, references, their_classes) if self.miner else None
                loss(rows, classes, tuples, ref_emb=references, ref_labels=their_classes)
            except Exception as error:  # a stranger's loss may refuse with anything
                raise _refusal(self.loss, " ".join(str(error).split()) or type(error).__name__) from error
        state.restore()
        self._tried = True

    def get_extra_state(self) -> Tensor:
        """Return (next row to write, rows in use, calls) for `state_dict()`: int64, on the processor."""
        return torch.tensor([self._next, self._count, self._calls])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave."""
        self._next, self._count, self._calls = (int(value) for value in state.tolist())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for embeddings of the width that was saved; torch copies into buffers of the same shape only."""
        saved = state_dict.get(f"{prefix}labels")
        if saved is not None and len(saved) != self.size:
            raise CheckpointError(
                f"the checkpoint's cross-batch memory has {len(saved)} rows, this one {self.size}: resume with the "
                "same size"
            )
        rows = state_dict.get(f"{prefix}embeddings")
        if rows is not None:
            self.embeddings = torch.empty_like(rows, device=self.embeddings.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        """Return the settings in one line, for `print(loss)` and what a model records of its training."""
        miner = "" if self.miner is None else f", miner={self.miner}"
        return f"CrossBatchMemory({self.loss}, size={self.size}{miner}, warmup={self.warmup}, weight={self.weight})"


def _check_settings(size: int, warmup: int, weight: float) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"size must be at least 1 row; got {size!r} (for no memory, use the loss by itself)")
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ConfigError(f"warmup must be a number of calls, 0 or more; got {warmup!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigError(f"weight must be a finite number above 0; got {weight!r}")


def _check_signature(loss: Callable[..., Tensor]) -> None:
    """Refuse a loss that has no place for references."""
    if getattr(loss, "needs_logits", False):
        raise _refusal(loss, "it is of logits")
    if not callable(loss):
        raise ConfigError(f"a cross-batch memory wraps a loss that can be called; got {loss!r}")
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        signature.bind(None, None, None, ref_emb=None, ref_labels=None)
    except TypeError as error:
        raise _refusal(loss, "it has no arguments ref_emb and ref_labels") from error


def _refusal(loss: object, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(loss).__name__} cannot compare a batch with a cross-batch memory ({reason}); "
        "use a loss of pairs or triplets, or no memory"
    )


def _share(loss: object) -> Tensor | None:
    share = getattr(loss, "active_share", None)
    return share if isinstance(share, Tensor) else None


def _larger(share: Tensor | None, other: Tensor | None) -> Tensor | None:
    return share if share is None or other is None else torch.maximum(share, other)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values without reading how many there are; NaN of none."""
    chosen = chosen.to(values.device)
    return torch.where(chosen, values, 0.0).sum() / chosen.sum()
