"""Gradient caching against the plain gradient: every loss, dropout, running statistics, scaling, and its memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn

from vitembed.architecture import ViTConfig
from vitembed.errors import VectorError
from vitembed.training.caching import cached_backward
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss
from vitembed.training.random_states import RandomStates
from vitembed.vit import ViT

LABELS = torch.arange(22) // 3  # the last class has one image
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "triplet": lambda: TripletLoss(0.3),
    "contrastive": ContrastiveLoss,
    "MultiSimilarityLoss": losses.MultiSimilarityLoss,
    "ProxyAnchorLoss": lambda: losses.ProxyAnchorLoss(num_classes=8, embedding_size=24),
}


def tiny_vit(dtype: torch.dtype = torch.float64, *, heads: int = 2) -> ViT:
    torch.manual_seed(0)
    config = ViTConfig(image_size=(8, 8), patch_size=4, width=24, depth=2, heads=heads, channels=1)
    return ViT(config).to(dtype).train()


def embed_with(vit: ViT) -> Callable[[Tensor], Tensor]:
    return lambda images: nn.functional.normalize(vit(images).cls)


def pixels(count: int = len(LABELS), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Take the gradients of all parameters that have one, and leave none behind."""
    found = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.grad is not None:
                found.append(parameter.grad)
            parameter.grad = None
    assert found
    return found


def relative(ours: list[Tensor], plain: list[Tensor]) -> float:
    flat, other = (torch.cat([part.reshape(-1) for part in parts]) for parts in (ours, plain))
    return float((flat - other).norm() / other.norm())


# The plain float32 gradient itself is 1.4e-6 from that in float64: other chunks, another order of sums.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk", [1, 5, 22, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_equals_the_plain_one(name: str, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    vit, images = tiny_vit(dtype), pixels(dtype=dtype)
    embed = embed_with(vit)
    torch.manual_seed(3)
    loss = LOSSES[name]().to(dtype)
    plain = loss(embed(images), LABELS)
    plain.backward()
    expected = gradients(vit, loss)
    embeddings, value = cached_backward(embed, images.split(chunk), lambda rows: loss(rows, LABELS), network=vit)
    assert relative(gradients(vit, loss), expected) <= tolerance
    torch.testing.assert_close(value, plain.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(embeddings, embed(images).detach(), rtol=0, atol=max(tolerance, 1e-14))
    assert not embeddings.requires_grad
    assert not value.requires_grad


def noisy(vit: ViT, share: float) -> Callable[[Tensor], Tensor]:
    """Embed with patch dropout and plain dropout."""
    vit.patch_dropout = 0.5
    drop = nn.Dropout(share)
    return lambda images: nn.functional.normalize(drop(vit(images).cls))


@pytest.mark.parametrize("chunk", [22, 5])
def test_dropout_drops_the_same_again_to_the_bit(chunk: int) -> None:
    vit, images = tiny_vit(), pixels()
    embed, loss = noisy(vit, 0.3), TripletLoss(0.3)

    def loss_of(rows: Tensor) -> Tensor:
        return loss(rows * torch.rand(rows.shape, dtype=rows.dtype), LABELS)  # the loss draws, too

    torch.manual_seed(5)
    loss_of(torch.cat([embed(part) for part in images.split(chunk)])).backward()
    expected, after = gradients(vit), torch.rand(3)
    torch.manual_seed(5)
    cached_backward(embed, images.split(chunk), loss_of, network=vit)
    ours = gradients(vit)
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)
    if chunk == 22:
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert relative(ours, expected) < 1e-12


@pytest.mark.parametrize("kind", ["batch norm", "spectral norm"])
def test_buffers_end_as_after_one_pass(kind: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(64, 12)
        normed = nn.utils.parametrizations.spectral_norm(layer) if kind == "spectral norm" else layer
        return nn.Sequential(nn.Flatten(), normed, nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6)).double()

    images, loss = pixels(), ContrastiveLoss()
    plain, ours = build(), build()
    # What depends on a chunk's own mean is another function than of the batch: the plain pass goes chunk by chunk, too.
    loss(torch.cat([plain(part) for part in images.split(8)]), LABELS).backward()
    cached_backward(ours, images.split(8), lambda rows: loss(rows, LABELS), network=ours)
    for (name, buffer), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert ours[2].num_batches_tracked == 3  # type: ignore[index]
    assert relative(gradients(ours), gradients(plain)) < 1e-12


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_loss_may_take_one_of_two_outputs(wanted: int) -> None:
    vit, images = tiny_vit(), pixels()
    head = nn.Linear(24, 8).double()
    network = nn.ModuleList([vit, head])
    loss = [TripletLoss(0.3), nn.CrossEntropyLoss()][wanted]

    def embed(part: Tensor) -> tuple[Tensor | None, ...]:
        pooled = vit(part).cls
        return nn.functional.normalize(pooled), head(pooled), None

    def loss_of(outputs: tuple[Tensor | None, ...]) -> Tensor:
        assert outputs[2] is None
        return loss(outputs[wanted], LABELS)  # type: ignore[no-any-return]

    loss_of(embed(images)).backward()
    expected = gradients(network)
    (embeddings, logits, nothing), _ = cached_backward(embed, images.split(5), loss_of, network=network)
    assert relative(gradients(network), expected) < 1e-12
    assert embeddings is not None
    assert logits is not None
    assert (embeddings.shape, logits.shape, nothing) == ((22, 24), (22, 8), None)


def test_the_scale_of_the_loss_reaches_the_network_once() -> None:
    vit, images, loss = tiny_vit(), pixels(), losses.ProxyAnchorLoss(num_classes=8, embedding_size=24).double()
    embed, calls = embed_with(vit), []
    loss(embed(images), LABELS).backward()
    expected = [1024 * gradient for gradient in gradients(vit, loss)]

    def backward(value: Tensor) -> None:
        calls.append(value)
        (1024 * value).backward()

    _, value = cached_backward(embed, images.split(5), lambda rows: loss(rows, LABELS), backward, network=vit)
    assert relative(gradients(vit, loss), expected) < 1e-12
    assert len(calls) == 1
    assert value == calls[0]


def test_gradients_are_added_to_those_that_are_there() -> None:
    vit, images = tiny_vit(), pixels()

    def run() -> None:
        cached_backward(embed_with(vit), images.split(5), lambda rows: TripletLoss(0.3)(rows, LABELS), network=vit)

    run()
    once = [parameter.grad.clone() for parameter in vit.parameters() if parameter.grad is not None]
    run()
    assert relative(gradients(vit), [2 * gradient for gradient in once]) < 1e-12


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_rounds_both_passes_alike(outer: bool) -> None:
    vit, images, loss = tiny_vit(torch.float32), pixels(dtype=torch.float32), TripletLoss(0.3)
    seen: list[Tensor] = []

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def embed(part: Tensor) -> Tensor:
        rows = nn.functional.normalize(vit(part).cls.float())
        seen.append(rows.detach())
        return rows

    with autocast():
        plain = embed(images)
    loss(plain, LABELS).backward()
    expected = gradients(vit)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        cached_backward(embed, images.split(11), lambda rows: loss(rows, LABELS), network=vit, autocast=autocast)
    assert len(expected) == len(gradients_by_cast(vit))
    assert all(torch.equal(first, second) for first, second in zip(seen[:2], seen[2:], strict=True))
    assert relative(gradients(vit), expected) < 2e-2  # sums in bfloat16, of other chunks


def gradients_by_cast(vit: ViT) -> list[Tensor]:
    """Return the gradients without taking them: a weight whose cast lost its graph has none."""
    return [parameter.grad for parameter in vit.parameters() if parameter.grad is not None]


def test_a_frozen_network_still_trains_the_proxies() -> None:
    vit, images = tiny_vit().requires_grad_(False), pixels()
    loss = losses.ProxyAnchorLoss(num_classes=8, embedding_size=24).double()
    loss(embed_with(vit)(images), LABELS).backward()
    expected = gradients(loss)
    cached_backward(embed_with(vit), images.split(5), lambda rows: loss(rows, LABELS), network=vit)
    assert relative(gradients(loss), expected) < 1e-12
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_gradient_checkpointing_goes_along() -> None:
    vit, images = tiny_vit(), pixels()
    loss = TripletLoss(0.3)
    torch.manual_seed(1)
    embed = noisy(vit, 0.2)
    state = RandomStates.now()
    cached_backward(embed, images.split(8), lambda rows: loss(rows, LABELS), network=vit)
    expected = gradients(vit)
    state.restore()
    vit.gradient_checkpointing = True
    cached_backward(embed, images.split(8), lambda rows: loss(rows, LABELS), network=vit)
    assert relative(gradients(vit), expected) < 1e-12


def test_random_states_come_back() -> None:
    states = RandomStates.now()
    drawn = torch.rand(5)
    states.restore()
    assert torch.equal(torch.rand(5), drawn)


def test_bad_chunks_are_refused() -> None:
    vit = tiny_vit()
    with pytest.raises(VectorError, match="at least one chunk"):
        cached_backward(embed_with(vit), (), lambda rows: rows.sum(), network=vit)
    with pytest.raises(VectorError, match=r"a chunk of 5 images must give 5 rows; got shape \(1, 24\)"):
        cached_backward(lambda part: vit(part).cls.mean(0, keepdim=True), pixels().split(5), torch.sum, network=vit)


class _Counted:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def bytes_kept() -> Iterator[list[int]]:
    """Count the bytes that graphs keep for their backward passes: now, and at most; each storage once."""
    figures, alive = [0, 0], dict[int, int]()

    def pack(tensor: Tensor) -> _Counted:
        kept, key, size = _Counted(tensor), tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        alive[key] = alive.get(key, 0) + 1
        figures[0] += size if alive[key] == 1 else 0
        figures[1] = max(figures)
        weakref.finalize(kept, release, key, size)
        return kept

    def release(key: int, size: int) -> None:
        alive[key] -= 1
        figures[0] -= size if alive[key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield figures


def test_a_batch_of_512_keeps_no_more_than_a_batch_of_32() -> None:
    vit = tiny_vit(torch.float32)
    embed, images, labels = embed_with(vit), pixels(512, torch.float32), torch.arange(512) // 4

    def plain(count: int) -> int:
        with bytes_kept() as figures:
            TripletLoss(0.3)(embed(images[:count]), labels[:count]).backward()
        assert figures[0] == 0
        return figures[1]

    with bytes_kept() as loss_alone:
        TripletLoss(0.3)(embed(images).detach().requires_grad_(), labels).backward()
    with bytes_kept() as figures:
        cached_backward(embed, images.split(32), lambda rows: TripletLoss(0.3)(rows, labels), network=vit)
    # The peak is of one chunk, or of the loss: never of both, and never of the batch.
    assert figures[1] <= max(plain(32), loss_alone[1])
    assert plain(32) < plain(512) / 10
