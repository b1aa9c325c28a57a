"""The states of the sources of random numbers: read, put back, seeded."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """The states of torch's sources of randomness at one moment: processor, every CUDA device in use, MPS.

    Attributes:
        cpu: state of the processor's generator, uint8.
        cuda: one for each CUDA device; empty while CUDA is not in use.
        mps: of an Apple GPU; None where there is none.
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    mps: Tensor | None

    @classmethod
    def now(cls) -> "RandomStates":
        """Read the states."""
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if cuda else (),
            torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        )

    def restore(self) -> None:
        """Put all sources back to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


def random_states() -> dict[str, Any]:
    """Return the states of all global sources of random numbers: Python's, numpy's, torch's and the devices'."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - losses of others draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave; devices that are not here are left out."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def seed_everything(seed: int) -> None:
    """Seed all global sources of random numbers: losses and miners of others draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def undisturbed_random_states() -> Iterator[None]:
    """Put all global sources of random numbers back at the end of the block to where they were."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
