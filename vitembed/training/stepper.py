"""What every training here does with a loss: backward pass, clipping, optimizer, the schedule of its rate."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from vitembed.errors import TrainingError
from vitembed.training.distributed import sum_gradients
from vitembed.training.optimizers import OptimizerName, build_optimizer


class StepConfig(Protocol):
    """What the configurations of all trainings have in common."""

    @property
    def warmup(self) -> float:
        """Share of the steps in which the rate rises from 0; then it falls to 0."""

    @property
    def clip(self) -> float:
        """Largest norm of the gradient, of all that is trained together."""

    @property
    def precision(self) -> str:
        """One of "fp32", "bf16", "fp16" and "auto"."""


class Stepper:
    """An optimizer with a linear warm-up and a cosine, in mixed precision.

    Args:
        groups: what is trained, as `parameter_groups` sorts it.
        device: where it is.
        config: the settings.
        steps: how many there will be.
        optimizer: its name.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        device: torch.device,
        config: StepConfig,
        *,
        steps: int,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        # accelerate keeps its settings for the whole process; an earlier training may have had others.
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = precision_on(device, config.precision).replace("fp32", "no")  # accelerate's word for it
        self._accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        self._of_network = [parameter for group in groups if not group["of_loss"] for parameter in group["params"]]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._clip = config.clip
        rising = int(config.warmup * steps)
        # The network itself is not prepared: accelerate would wrap its `forward` in mixed precision for good, and the
        # embedder would then give other vectors than the model that is saved.
        self._optimizer = self._accelerator.prepare(build_optimizer(optimizer, groups))
        # Nor is the schedule, which accelerate would let run as many times as fast as there are processes.
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer.optimizer, lambda step: _rate(step, rising, steps)
        )

    @property
    def learning_rate(self) -> float:
        """Rate of the next step, the highest of the network's groups."""
        rates = self._schedule.get_last_lr()
        groups = self._optimizer.param_groups
        return max(float(rate) for rate, group in zip(rates, groups, strict=True) if not group["of_loss"])

    def use_rate(self, rate: float) -> None:
        """Let the next step have this as the highest rate of the network, in place of the schedule's."""
        groups = self._optimizer.param_groups
        top = max(group["initial_lr"] for group in groups if not group["of_loss"])
        for group in groups:
            group["lr"] = rate * group["initial_lr"] / top

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward pass runs in the wanted precision."""
        return self._accelerator.autocast()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to those of the parameters, scaled where the precision needs it."""
        self._accelerator.backward(loss)

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, as half precision wants, and steps skipped while the scale is too large."""
        return self._accelerator.scaler is not None

    def clip(self) -> Tensor:
        """Clip the gradient, and return its norm before that, a scalar.

        Where several processes train together, each has the gradient of its own images, and now has that of all.
        """
        sum_gradients(self._of_network)
        norm: Tensor = self._accelerator.clip_grad_norm_(self._parameters, self._clip)
        return norm.detach()

    def advance(self) -> None:
        """Take one step down the clipped gradient, and forget it."""
        self._optimizer.step()
        if not self._optimizer.step_was_skipped:  # as it is when numbers of half precision overflow
            self._schedule.step()
        self._optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of a scalar."""
        self.backward(loss)
        self.clip()
        self.advance()

    def state_dict(self) -> dict[str, Any]:
        """Return what the optimizer and its schedule are continued from."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])


def check_finite(loss: float) -> None:
    """Stop a training that has gone astray.

    Raises:
        TrainingError: if the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss}: lower the learning rate, or use precision fp32; "
            "the model has the weights that were kept of an epoch before this, if it ended one"
        )


def _rate(step: int, warmup: int, steps: int) -> float:
    """Return the share of the highest rate: linear up, cosine down."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def precision_on(device: torch.device, precision: str) -> str:
    """Return what a precision is on a device: "auto" is "bf16" where CUDA has it, else "fp32"."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
