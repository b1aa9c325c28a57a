"""What every training here does with a loss: backward pass, clipping, optimizer, the schedule of its rate."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from vitembed.errors import ConfigError, TrainingError


class StepConfig(Protocol):
    """What the configurations of all trainings have in common."""

    @property
    def learning_rate(self) -> float:
        """The highest rate."""

    @property
    def weight_decay(self) -> float:
        """Of matrices only; norms, biases, positions and single tokens are left alone."""

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
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a linear warm-up and a cosine, in mixed precision.

    Args:
        network: what is trained.
        loss: whose parameters are trained along, if it is a module that has some.
        device: where the network is.
        config: the settings.
        steps: how many there will be.

    Raises:
        ConfigError: if several processes were launched.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Tensor] | None,
        device: torch.device,
        config: StepConfig,
        *,
        steps: int,
    ) -> None:
        # accelerate keeps its settings for the whole process; an earlier training may have had others.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(
            mixed_precision=_mixed_precision(config.precision, device), cpu=device.type == "cpu"
        )
        if self._accelerator.num_processes > 1:
            raise ConfigError("training runs in one process; start it without `accelerate launch`")
        groups = _parameter_groups(network, loss, device, config.weight_decay)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._clip = config.clip
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        rising = int(config.warmup * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, rising, steps))
        # The network itself is not prepared: accelerate would wrap its `forward` in mixed precision for good, and the
        # embedder would then give other vectors than the model that is saved.
        self._optimizer, self._schedule = self._accelerator.prepare(optimizer, schedule)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward pass runs in the wanted precision."""
        return self._accelerator.autocast()  # type: ignore[no-any-return]

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of a scalar."""
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


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


def _parameter_groups(
    network: nn.Module, loss: Callable[..., Tensor] | None, device: torch.device, weight_decay: float
) -> list[dict[str, Any]]:
    """Decay matrices; leave norms, biases, positions and single tokens alone. A loss may have parameters as well."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "_token"))
        (others if plain else matrices).append(parameter)
    if isinstance(loss, nn.Module):
        others += list(loss.to(device).parameters())
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, warmup: int, steps: int) -> float:
    """Return the share of the highest rate: linear up, cosine down."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _mixed_precision(precision: str, device: torch.device) -> str:
    """Return accelerate's word for a precision."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    return "no" if precision == "fp32" else precision
