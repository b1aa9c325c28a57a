"""Several processes train one network: whole batches from shares, gradients that do not depend on their number.

Each process embeds its share of a batch, gathers the embeddings of all in rank order, and computes the loss of the
whole batch. Gradient flows from there to its own rows only; summed over the processes (`sum_gradients`), the network's
gradient is that of one process with the whole batch. So nothing is averaged, and batch size and learning rate mean the
same with one process and with eight.

A loss's own parameters (proxies, weights of a classifier that takes gathered embeddings) have the whole gradient in
each process already and must not be summed.

All functions work alone, too: without an initialised `torch.distributed` there is one process. Those that talk to the
others must be called by all of them, in the same order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor, nn

from vitembed.errors import TrainingError, VectorError
from vitembed.training.random_states import seed_everything, undisturbed_random_states

_Value = TypeVar("_Value")


def join_processes(device: torch.device) -> None:
    """Meet the processes that were launched together with this one, by `torchrun` or `accelerate launch`.

    Until then each believes itself alone.

    Args:
        device: where this process works, which decides how they talk to each other.
    """
    PartialState._reset_state()  # an earlier training may have worked on another device
    PartialState(cpu=device.type == "cpu")


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """Return the number of processes; 1 where none were launched together."""
    return dist.get_world_size() if _initialised() else 1


def on_main() -> bool:
    """Tell whether this is the process that writes: rank 0, or the only one."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Tell every process whether one of them says yes, as when one got SIGTERM: all then stop at the same step."""
    if not _several():
        return flag
    answer = torch.tensor([int(flag)], device=_wire())
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def from_main(value: _Value) -> _Value:
    """Return rank 0's value in every process: any small object that can be pickled, such as a decision to stop."""
    if not _several():
        return value
    box: list[object] = [value if on_main() else None]
    dist.broadcast_object_list(box, src=0, device=_wire())
    return cast(_Value, box[0])


def gather_objects(value: _Value) -> list[_Value]:
    """Return what every process gave, in rank order: small objects that can be pickled."""
    if not _several():
        return [value]
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[_Value], values)


@contextmanager
def drawing_alike(seed: int) -> Iterator[None]:
    """Let all processes draw the same random numbers inside the block, however many each has drawn before.

    A loss or miner that draws must choose the same in every process. One process alone draws as it does anyway.
    """
    if not _several():
        yield
        return
    with undisturbed_random_states():
        seed_everything(seed)
        yield


def share_sizes(count: int) -> list[int]:
    """Return how many rows every process has, in rank order, where this one has `count`."""
    return gather_objects(count)


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all processes in rank order; gradient flows to the own ones, the others are constant.

    Args:
        rows: (n, ...) of this process; n may differ between processes and be 0.
        sizes: n of every process, where it is known: saves an exchange, and on a GPU a wait for it.

    Returns:
        (sum of n, ...) on the device of the rows.

    Raises:
        VectorError: the rows of the processes are of different width or type; with `sizes`, this is not looked at.
    """
    if not _several():
        return rows
    sizes = _shares(rows) if sizes is None else sizes
    own = rows.detach().to(_wire())
    padded = own.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    parts = [part[:size].to(rows.device) for part, size in zip(received, sizes, strict=True)]
    parts[rank()] = rows
    return torch.cat(parts)


def gather_labels(labels: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the labels of all processes in rank order, (n,) integers each, as `gather_rows` does.

    Raises:
        VectorError: these are no labels, or they differ in type between processes.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise VectorError(f"labels must be integers of shape (n,); got {labels.dtype} of {tuple(labels.shape)}")
    return gather_rows(labels, sizes)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes; its gradient is summed over them as well."""
    return cast(Tensor, _Sum.apply(tensor)) if _several() else tensor


def sum_gradients(parameters: Iterable[nn.Parameter], *, bucket_bytes: int = 32 * 2**20) -> None:
    """Replace the gradients by their sums over the processes, before they are unscaled or clipped.

    A parameter that got no gradient here counts as zeros; one that got none anywhere keeps none, so that an optimizer
    passes it over as it would with one process. Give the network's parameters alone, not those of the loss.

    Args:
        parameters: the same in every process, in the same order.
        bucket_bytes: how much travels in one message, at most (a larger parameter travels alone).
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not _several() or not trained:
        return
    present = torch.tensor([int(parameter.grad is not None) for parameter in trained], device=_wire())
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    moved = [parameter for parameter, somewhere in zip(trained, present.tolist(), strict=True) if somewhere]
    for bucket in _buckets(moved, bucket_bytes):
        _sum_bucket(bucket)


def broadcast_state(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers."""
    if not _several():
        return
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            sent = tensor.detach().to(_wire()).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def check_alike(facts: Mapping[str, object]) -> None:
    """Stop every process if they do not agree on something.

    Args:
        facts: name to a small value that can be pickled and compared, such as `digest(labels)` or a setting.

    Raises:
        TrainingError: in all processes; it names the first fact that differs, and the first process that differs in it.
    """
    if not _several():
        return
    answers: list[dict[str, object]] = [{} for _ in range(world_size())]
    dist.all_gather_object(answers, dict(facts))
    for name in dict.fromkeys(name for answer in answers for name in answer):
        for number, answer in enumerate(answers):
            here, there = answer.get(name, "nothing"), answers[0].get(name, "nothing")
            if here != there:
                raise TrainingError(
                    f"process {number} differs from process 0 in {name}: {here} instead of {there}; "
                    "start all processes with the same model, data, settings and versions"
                )


def lost_process(error: RuntimeError) -> TrainingError | None:
    """Return what to say if an error means that another process has gone; None for any other error."""
    words = ("Connection reset", "Connection closed", "Socket closed", "Broken pipe")
    if not _several() or not any(word in str(error) for word in words):
        return None
    return TrainingError(
        "another process of this training has ended, and its own message says why; resume goes on from the last "
        "checkpoint"
    )


def check_same_weights(module: nn.Module, name: str = "weights") -> None:
    """Stop every process if a parameter or buffer is not the same in all of them, to the bit.

    Raises:
        TrainingError: it names the first tensor that differs.
    """
    if _several():  # reading all weights takes a while
        tensors = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        check_alike({f"{name} {key}": digest(value) for key, value in tensors.items()})


def digest(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits that stand for a tensor's type, shape and bytes (SHA-256, cut)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


class _Sum(torch.autograd.Function):
    """A sum over processes: what one of them adds to it concerns the losses of all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum."""
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the sum of what the processes want of it."""
        return _summed(grad)


def _summed(tensor: Tensor) -> Tensor:
    sent = tensor.detach().to(_wire(), copy=True).contiguous()
    dist.all_reduce(sent)
    return sent.to(tensor.device)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _several() -> bool:
    return world_size() > 1


def _wire() -> torch.device:
    """Return the device whose tensors the processes can exchange: NCCL takes those of the GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _shares(rows: Tensor) -> list[int]:
    """Ask every process how many rows it has.

    Raises:
        VectorError: in all processes, if the rows cannot be put together.
    """
    width = rows[:1].numel() if len(rows) else rows.new_empty(1, *rows.shape[1:]).numel()
    own = torch.tensor([len(rows), width, rows.element_size(), int(rows.is_floating_point())], device=_wire())
    answers = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(answers, own)
    sizes, *kinds = zip(*(answer.tolist() for answer in answers), strict=True)
    if any(len(set(kind)) > 1 for kind in kinds):
        raise VectorError(
            f"rows of all processes must have one width and type; got widths {list(kinds[0])} of {list(kinds[1])} bytes"
        )
    return list(sizes)


def _buckets(parameters: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Cut a list into runs of one type and device that are no larger than the limit."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or held + size > limit):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket


@torch.no_grad()
def _sum_bucket(bucket: list[nn.Parameter]) -> None:
    for parameter in bucket:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in bucket]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(_wire())
    dist.all_reduce(flat)
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
