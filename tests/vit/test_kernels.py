"""The faster ways through a layer: the plain layer's numbers, and the plain layer itself wherever more is wanted."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vitembed.vit import ViT, ViTConfig, kernels
from vitembed.vit.kernels import attention, linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each call of the fused operator."""
    calls: list[str] = []
    inner = kernels._fused

    def counted(*arguments: object) -> Tensor:
        calls.append("fused")
        return inner(*arguments)

    kernels._onednn_linear()  # it calls the operator itself the first time
    monkeypatch.setattr(kernels, "_fused", counted)
    return calls


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a vector": torch.randn(6, generator=g),
        "a matrix": torch.randn(4, 6, generator=g),
        "tokens": torch.randn(2, 3, 6, generator=g),
        "four dimensions": torch.randn(2, 2, 3, 6, generator=g),
        "an empty batch": torch.randn(0, 3, 6, generator=g),
        "no tokens": torch.randn(2, 0, 6, generator=g),
        "a transposed batch": torch.randn(3, 2, 6, generator=g).transpose(0, 1),
        "transposed rows": torch.randn(2, 6, 3, generator=g).transpose(1, 2),
        "a slice": torch.randn(2, 5, 6, generator=g)[:, 1:3],
        "every second number": torch.randn(2, 3, 12, generator=g)[..., ::2],
        "an expanded batch": torch.randn(1, 3, 6, generator=g).expand(2, -1, -1),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", inputs())
def test_the_result_is_that_of_the_plain_layers(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    x, layer = inputs()[name], nn.Linear(6, 5, bias=bias)
    shortcuts = [torch.randn(*x.shape[:-1], 5), torch.randn(*x.shape[:-1], 10)[..., ::2]]
    if x.ndim == 3:
        shortcuts += [torch.randn(x.shape[0], x.shape[1] + 2, 5)[:, 1:-1], torch.randn(5, *x.shape[:2]).movedim(0, -1)]
    with torch.inference_mode():
        plain = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(linear(layer, x), plain, rtol=0, atol=2e-6)
        torch.testing.assert_close(linear(layer, x, gelu=True), F.gelu(plain), rtol=0, atol=2e-6)
        for shortcut in shortcuts:
            torch.testing.assert_close(linear(layer, x, shortcut=shortcut), shortcut + plain, rtol=0, atol=2e-6)


def strided_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.randn(10)[::2])


def offset_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.randn(9)[3:8])


def transposed_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(6, 5).t())


def strided_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(5, 12)[:, ::2])


@pytest.mark.parametrize("lay", [strided_bias, offset_bias, transposed_weight, strided_weight])
def test_parameters_may_lie_in_memory_as_they_like(lay: types.FunctionType) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    lay(layer)
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), layer(x), rtol=0, atol=2e-6)


def test_nothing_that_was_passed_is_written_to_or_handed_back() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 6), torch.randn(2, 3, 6)
    before = x.clone()
    with torch.inference_mode():
        first = linear(layer, x, shortcut=x)  # as in a block, where the shortcut is read again
        copy = first.clone()
        second = linear(layer, 2 * x, shortcut=x)
    assert torch.equal(x, before)
    assert torch.equal(first, copy)
    assert len({t.data_ptr() for t in (x, first, second)}) == 3


@needs_onednn
def test_the_fused_operator_runs_where_only_numbers_are_wanted(fused: list[str]) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            linear(layer, x)
    assert len(fused) == 2


@needs_onednn
def test_a_whole_network_takes_it_and_computes_the_same(fused: list[str]) -> None:
    torch.manual_seed(0)
    vit = ViT(ViTConfig((16, 16), 8, 3, 32, 2, 4)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        without_graph = vit(images, patches=True).patches
    assert len(fused) == 8  # four linear layers a block
    torch.testing.assert_close(without_graph, vit(images, patches=True).patches, rtol=0, atol=1e-5)
    assert len(fused) == 8


class Doubled(nn.Linear):
    """An adapter, as others write them."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_early_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def with_another_forward(layer: nn.Linear) -> None:
    layer.forward = types.MethodType(lambda self, x: -F.linear(x, self.weight), layer)  # type: ignore[method-assign]


def with_a_parametrisation(layer: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(layer)


class Labelled(Tensor):
    """A tensor type of a stranger."""


def with_a_weight_of_another_type(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Labelled))


@pytest.mark.parametrize(
    "change",
    [with_hook, with_early_hook, with_another_forward, with_a_parametrisation, with_a_weight_of_another_type],
)
def test_a_layer_with_something_on_it_is_called(change: types.FunctionType, fused: list[str]) -> None:
    torch.manual_seed(0)
    layer, x, shortcut = nn.Linear(6, 5), torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    change(layer)
    with torch.inference_mode():
        assert torch.equal(linear(layer, x), layer(x))
        assert torch.equal(linear(layer, x, gelu=True), F.gelu(layer(x)))
        assert torch.equal(linear(layer, x, shortcut=shortcut), shortcut + layer(x))
    assert fused == []


def test_a_subclass_and_a_strangers_module_are_called(fused: list[str]) -> None:
    x = torch.randn(2, 3, 6)
    for layer in (Doubled(6, 5), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))):
        with torch.inference_mode():
            assert torch.equal(linear(layer, x), layer(x))
    assert fused == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_take_the_plain_layer(dtype: torch.dtype, fused: list[str]) -> None:
    layer, x = nn.Linear(6, 5, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(linear(layer, x), layer(x))
    assert fused == []


def test_autocast_is_obeyed(fused: list[str]) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    assert fused == []


def test_gradients_flow_where_they_are_wanted(fused: list[str]) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    linear(layer, x, gelu=True).sum().backward()
    assert layer.weight.grad is not None
    assert fused == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_derivatives_that_need_no_graph_are_not_lost(fused: list[str]) -> None:
    layer, x, direction = nn.Linear(6, 5), torch.randn(2, 6), torch.randn(2, 6)
    with torch.no_grad():
        _, slope = torch.func.jvp(lambda t: linear(layer, t), (x,), (direction,))
        torch.testing.assert_close(slope, F.linear(direction, layer.weight))
        with forward_ad.dual_level():
            y = linear(layer, forward_ad.make_dual(x, direction))
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, slope)
    assert fused == []


def test_what_watches_the_operators_sees_the_product(fused: list[str]) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            linear(layer, x)
        mapped = torch.func.vmap(lambda t: linear(layer, t))(x)
        torch.testing.assert_close(mapped, layer(x))
    assert counter.get_total_flops() == 2 * 6 * 6 * 5
    assert fused == []


def test_a_width_that_does_not_fit_is_the_plain_layers_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(nn.Linear(6, 5), torch.zeros(2, 7))


@needs_onednn
def test_the_trial_of_the_operator_depends_on_nothing_and_changes_nothing() -> None:
    torch.manual_seed(0)
    kernels._onednn_linear.cache_clear()
    state = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert kernels._onednn_linear() is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", ["missing", "another result", "refused"])
def test_an_operator_that_is_not_there_or_not_right_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Tensor:
        raise {"missing": AttributeError, "refused": RuntimeError}[wrong]("no such thing")

    def off(*arguments: Tensor) -> Tensor:
        return torch.full((2, 2, 2), math.pi)

    monkeypatch.setattr(kernels, "_fused", off if wrong == "another result" else fail)
    kernels._onednn_linear.cache_clear()
    try:
        assert kernels._onednn_linear() is None
        layer, x = nn.Linear(6, 5), torch.randn(2, 6)
        with torch.no_grad():
            assert torch.equal(linear(layer, x), layer(x))
    finally:
        kernels._onednn_linear.cache_clear()


def tiny() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig((8, 8), 4, 3, width=16, depth=2, heads=2, num_classes=3))


def test_a_batch_in_parts_gives_what_it_gives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = tiny().eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        whole = vit(images, patches=True)
        monkeypatch.setattr(kernels, "_CACHED_BYTES", 2 * 4 * 5 * 64)  # two images
        sizes: list[int] = []
        vit.patch_embed.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
        parts = vit(images, patches=True)
    assert sizes == [2, 2, 1]
    for name in ("cls", "patches", "logits"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-6)
    assert parts.attentions is None


def test_training_never_parts_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CACHED_BYTES", 1)
    vit = ViT(ViTConfig((8, 8), 4, 3, width=16, depth=1, heads=2, stem=((8, 2), (16, 2)))).train()
    sizes: list[int] = []
    vit.patch_embed.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    with torch.no_grad():
        vit(torch.randn(3, 3, 8, 8))  # the statistics of a stem's norm are of the whole batch
    vit(torch.randn(3, 3, 8, 8))
    assert sizes == [3, 3]


def test_a_hook_for_all_modules_sees_the_linear_layers() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _i, _o: seen.append(type(module).__name__))
    try:
        with torch.inference_mode():
            tiny().eval()(torch.zeros(1, 3, 8, 8))
    finally:
        handle.remove()
    assert seen.count("Linear") > 4


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each call of torch's attention."""
    calls: list[str] = []
    inner = F.scaled_dot_product_attention

    def counted(*arguments: Tensor, **settings: Tensor | None) -> Tensor:
        calls.append("fused")
        return inner(*arguments, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "with a bias"])
@pytest.mark.parametrize("spread", [1, 4])
def test_attention_trained_in_bfloat16_is_nearly_as_exact_as_the_fused_kernel(
    spread: int, biased: bool, sdpa: list[str]
) -> None:
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, 3, 9, 16, generator=g).bfloat16() for _ in range(3)]
    leaves[0] *= spread  # of the logits, that is
    gradient = torch.randn(2, 3, 9, 16, generator=g).bfloat16()
    bias = torch.randn(2, 1, 1, 9, generator=g).bfloat16() if biased else None

    def passes(kind: torch.dtype, training: bool) -> list[Tensor]:
        """Return the result and the gradients."""
        inputs = [leaf.to(kind).requires_grad_() for leaf in leaves]
        result = attention(*inputs, None if bias is None else bias.to(kind), training=training)
        assert result.dtype == kind
        return [result, *torch.autograd.grad(result, inputs, gradient.to(kind))]

    exact, fused = passes(torch.float64, False), passes(torch.bfloat16, False)
    assert len(sdpa) == 2
    ours = passes(torch.bfloat16, True)
    assert len(sdpa) == 2
    for a, b, truth in zip(ours, fused, exact, strict=True):
        error, fused_error = ((x - truth).norm() / truth.norm() for x in (a, b))
        assert error < 0.01 * spread
        assert error < 8 * fused_error


def test_attention_elsewhere_is_the_fused_kernel(sdpa: list[str]) -> None:
    short, long = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 300, 8)
    for count, (x, training) in enumerate([(short, True), (short.bfloat16(), False), (long.bfloat16(), True)], start=1):
        attention(x, x, x, training=training)
        assert len(sdpa) == count


def test_a_pass_in_training_is_the_same_with_and_without_a_graph() -> None:
    config = ViTConfig((16, 16), 4, width=16, depth=2, heads=2, stem=((8, 2), (16, 2)))
    net, images = ViT(config).train(), torch.rand(3, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        kept = net(images).cls
        with torch.no_grad():
            assert torch.equal(net(images).cls, kept)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolutional_stem_keeps_the_channels_of_a_pixel_side_by_side(channels: int) -> None:
    config = ViTConfig((16, 16), 4, channels, width=8, depth=1, heads=1, stem=((4, 2), (8, 2)))
    embed, images = ViT(config).eval().patch_embed, torch.rand(2, channels, 16, 16)
    expected = embed.proj(embed.stem(images)).flatten(2).transpose(1, 2)
    layouts: list[bool] = []
    for layer in embed.stem:
        layer.register_forward_hook(
            lambda _module, _inputs, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(embed(images), expected)
    assert layouts == [True] * 6
    assert embed(images[:0]).shape == (0, 16, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolutional_stem_can_be_mapped(channels: int) -> None:
    config = ViTConfig((16, 16), 4, channels, width=8, depth=1, heads=1, stem=((4, 2), (8, 2)))
    embed, images = ViT(config).eval().patch_embed, torch.rand(2, 1, channels, 16, 16)
    torch.testing.assert_close(torch.func.vmap(embed)(images)[:, 0], embed(images[:, 0]))
