"""Batch normalisation over the whole batch when several processes have a share of it each.

Otherwise each process would normalise by the statistics of its own images, and what is learned would depend on the
number of processes. torch's own SyncBatchNorm does this on some accelerators; here it is done wherever processes can
talk to each other, without a change to the network's modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitembed.training.distributed import sum_over_processes, world_size


@contextmanager
def shared_norms(network: nn.Module) -> Iterator[None]:
    """Let the network's batch normalisations take the mean and variance of the images of all processes in training.

    The gradient is that of the whole batch, too: after the gradients of all processes are summed, it is the one of a
    single process. All processes must run the network equally often.
    """
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)] if world_size() > 1 else []
    for norm in norms:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # the class's own comes to the fore again


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalise (B, C, ...) by the statistics of all processes (Ioffe and Szegedy 2015, arXiv:1502.03167)."""
    if not norm.training:
        return type(norm).forward(norm, x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        sums = sum_over_processes(
            torch.cat([wide.sum(axes), count])
        )  # its gradient is summed over the processes as well
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        variance = sum_over_processes(centred.square().sum(axes)) / total
        _remember(norm, mean.detach(), variance.detach() * total / (total - 1).clamp_min(1))
        y = centred * torch.rsqrt(variance + norm.eps).view(shape)
        if norm.affine:
            y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Let the running statistics take in those of a batch, as torch's own forward pass does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
