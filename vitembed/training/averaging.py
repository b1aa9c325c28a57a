"""The moving average of a network's weights, which often embeds better than the weights of any single step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average of a network's state (Polyak and Juditsky 1992; as in Tarvainen and Valpola 2017).

    After n steps the decay is min(decay, (1 + n) / (10 + n)), so that the first steps, which know nothing yet, are soon
    forgotten. Buffers of whole numbers are copied.

    Args:
        network: whose state is averaged; the average begins as a copy of it.
        decay: share of the average that a step keeps, in (0, 1); 0.999 remembers about a thousand steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._steps = 0
        self._average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        state = self._network.state_dict()
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._average[name] for name in floats], [state[name] for name in floats], 1 - decay)
        for name in state.keys() - set(floats):
            self._average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the averaged weights inside the block."""
        own = {name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()}
        self._network.load_state_dict(self._average)
        try:
            yield
        finally:
            self._network.load_state_dict(own)

    def state_dict(self) -> dict[str, object]:
        """Return what the average is continued from."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from what `state_dict` gave."""
        self._steps = int(state["steps"])  # type: ignore[call-overload]
        average: dict[str, Tensor] = state["average"]  # type: ignore[assignment]
        for name, tensor in average.items():
            self._average[name].copy_(tensor)
