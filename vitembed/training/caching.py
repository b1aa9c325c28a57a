"""Gradient caching: the gradient of a loss of a large batch in the memory of a small one.

A loss that compares all images of a batch needs all of its embeddings at once, but not the activations behind them. So
the batch is embedded in chunks without a graph, the loss is taken once of all embeddings, and then each chunk is
embedded again, with a graph, and given its part of the loss's gradient (Gao, Zhang, Han and Callan 2021,
arXiv:2101.06983, section 3.2). Time is one more forward pass; the memory of activations is that of one chunk.

The second pass must repeat the first to the letter, so torch's random states and the network's buffers are put back for
it. Randomness from elsewhere (numpy, `random`) is not: a network that draws from there gets a wrong gradient.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitembed.errors import VectorError
from vitembed.training.random_states import RandomStates

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor | None, ...])  # embeddings, or (embeddings, logits or None)

_Row = tuple[Tensor | None, ...]


def cached_backward(
    embed: Callable[[Tensor], Outputs],
    chunks: Sequence[Tensor],
    loss_of: Callable[[Outputs], Tensor],
    backward: Callable[[Tensor], None] = Tensor.backward,
    *,
    network: nn.Module,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Outputs, Tensor]:
    """Add the gradient of a loss of a whole batch to the parameters behind it, a chunk of activations at a time.

    Afterwards gradients (of the network, and of the loss's own parameters), buffers and random states are those of a
    forward pass over the chunks, the loss, and `backward`.

    Args:
        embed: what makes embeddings of a chunk, or a tuple such as (embeddings, logits) in which any may be None; the
            rows of each output are those of the chunk. It is called twice for each chunk and must give the same twice.
        chunks: the batch in parts, such as `pixels.split(32)`; the last may be smaller.
        loss_of: the scalar loss of the outputs for the whole batch, as `embed` gives them. Here rows of other processes
            are gathered, where there are some.
        backward: how the loss is back-propagated, such as `accelerator.backward`, which scales it in float16. It is
            called once; the scale reaches the network's gradients through those of the embeddings.
        network: whose buffers (running statistics) change when `embed` is called.
        autocast: makes the context in which `embed` runs.

    Returns:
        The outputs for the whole batch and the loss, both without graph.

    Raises:
        VectorError: there are no chunks, or an output has not as many rows as its chunk.
    """
    if not chunks:
        raise VectorError("a batch must have at least one chunk of images; got none")
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    states: list[RandomStates] = []
    parts: list[_Row] = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomStates.now())
            with autocast():
                parts.append(_as_row(embed(chunk), len(chunk)))
    single = isinstance(parts[0], _Single)
    leaves = _joined(parts)
    loss = loss_of(leaves[0] if single else leaves)  # type: ignore[arg-type]
    backward(loss)
    after = RandomStates.now()

    _put_back(network, buffers)
    torch.clear_autocast_cache()  # of a caller's autocast: older torch reuses weights that it cast without graph
    gradients = _split([None if leaf is None else leaf.grad for leaf in leaves], [len(chunk) for chunk in chunks])
    for chunk, state, given in zip(chunks, states, gradients, strict=True):
        state.restore()
        with autocast():
            row = _as_row(embed(chunk), len(chunk))
        _push_back(row, given)
        del row  # not kept beside the next chunk's
    after.restore()
    whole = tuple(None if leaf is None else leaf.detach() for leaf in leaves)
    return (whole[0] if single else whole), loss.detach()  # type: ignore[return-value]


class _Single(tuple[Tensor | None, ...]):
    """The one output of a network that gives no tuple."""


def _as_row(outputs: Tensor | tuple[Tensor | None, ...], rows: int) -> _Row:
    """Return a chunk's outputs as a tuple, after a look at their lengths."""
    row = _Single((outputs,)) if isinstance(outputs, Tensor) else tuple(outputs)
    for output in row:
        if output is not None and (output.ndim == 0 or len(output) != rows):
            raise VectorError(f"a chunk of {rows} images must give {rows} rows; got shape {tuple(output.shape)}")
    return row


def _joined(parts: list[_Row]) -> _Row:
    """Return each output of the whole batch, as a leaf that collects a gradient where it can have one."""
    whole: list[Tensor | None] = []
    for column in zip(*parts, strict=True):
        rows = [part for part in column if part is not None]
        joined = torch.cat(rows) if rows else None
        whole.append(joined.requires_grad_() if joined is not None and joined.is_floating_point() else joined)
    return tuple(whole)


def _split(gradients: list[Tensor | None], sizes: list[int]) -> list[_Row]:
    """Return each chunk's part of the gradients; an output that the loss did not look at has none."""
    columns = [(None,) * len(sizes) if whole is None else torch.split(whole, sizes) for whole in gradients]
    return list(zip(*columns, strict=True))


def _push_back(outputs: _Row, gradients: _Row) -> None:
    """Back-propagate a chunk's cached gradients through its graph; a frozen network has none."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if output is not None and gradient is not None and output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


@torch.no_grad()
def _put_back(network: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
