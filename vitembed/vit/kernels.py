"""Faster ways through a layer on a processor: linear layers at inference, attention in training, convolutions.

PyTorch sends float32 matrix products on a processor to MKL. Its copy of oneDNN is faster at the shapes of a ViT (by a
tenth to a third, measured on AMD EPYC), and adds the bias, the GELU or the shortcut while the result is in the cache.
The operator has no public name, so that it is tried once on a small case; where it is missing or gives another result,
and wherever a gradient, another type, a device, tracing or a stranger's layer is in play, the plain layer runs. The
operator knows nothing of what PyTorch can do around a product (derivatives, `vmap`, counters).
"""

from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_CACHED_BYTES = 10 * 2**20
_FEW_TOKENS = 256  # whose attention weights are small beside what else a block keeps for its gradient


def linear(layer: nn.Module, x: Tensor, *, gelu: bool = False, shortcut: Tensor | None = None) -> Tensor:
    """Return `layer(x)`, with an exact GELU after it or a shortcut added to it.

    Args:
        layer: an `nn.Linear`; anything else (an adapter, a quantised layer) is simply called.
        x: (..., in) floats.
        gelu: apply the GELU to the result.
        shortcut: (..., out) of the type of the result, added to it and itself left as it is; not together with `gelu`.

    Returns:
        (..., out), equal to the plain layers up to rounding.
    """
    if is_plain(layer) and _plain_inference(x, layer) and (operator := _onednn_linear()) is not None:
        return _fused(operator, x, layer.weight, layer.bias, gelu, shortcut)
    y: Tensor = layer(x)
    if gelu:
        return F.gelu(y)
    return y if shortcut is None else shortcut + y


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, training: bool = False) -> Tensor:
    """Return scaled dot-product attention, softmax(q k^T / sqrt(d) + bias) v (equation 1 of arXiv:1706.03762).

    Training on a processor in bfloat16, with few tokens, takes the formula as it is written: forward and backward it
    is 1.7 to 4.7 times as fast as torch's fused kernel (2.15, 17 to 197 tokens, `benchmarks/attention.py`). It keeps
    the (B, h, n, T) weights for the way back, and rounds the logits to bfloat16, too: where these have a deviation of
    1, the result's error is 0.4 % in place of 0.2.

    Args:
        q: (B, h, n, d) queries.
        k: (B, h, T, d) keys.
        v: (B, h, T, d) values.
        bias: broadcasts to (B, h, n, T), added to the logits.
        training: whether the network is being trained. Passes without a graph count, too: a gradient cache embeds
            twice, and must find the same.

    Returns:
        (B, h, n, d).
    """
    if training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= _FEW_TOKENS:
        return attention_weights(q, k, bias).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias), (B, h, n, T), of what `attention` takes."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights: Tensor = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights


def channels_last(images: Tensor) -> Tensor:
    """Return (B, C, H, W) images with the channels of a pixel side by side: faster convolutions in bfloat16.

    With one channel both layouts are one, and only the strides tell the convolution which is meant. What is compiled,
    exported or mapped (`vmap`) stays as it is: a compiler chooses layouts, and `vmap` knows one.
    """
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state()
    if recorded or torch._C._functorch.peek_interpreter_stack() is not None:
        return images
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = images.shape
    return images.contiguous().as_strided((batch, 1, height, width), (height * width, 1, width, 1))


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a layer is an `nn.Linear` with no hook on it and no other `forward` put into it.

    Only then may its weight be used without the layer being called.
    """
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__  # where accelerate puts its own
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]  # a profiler's
    )


def images_at_once(*, bytes_each: int, device: torch.device) -> int | None:
    """Return how many images should go through the network together at inference; None for all of a batch.

    On a processor a few at a time: the largest tensor of a block then stays in the cache, and small enough for the
    allocator to reuse; larger ones are handed back to the system and come again page by page (measured: 8 % of the
    time of ViT-S/16 with 16 images).

    Args:
        bytes_each: size of the largest tensor of a block, for one image.
        device: where the network is.
    """
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state()  # for batches of other sizes, too
    if device.type != "cpu" or torch.is_grad_enabled() or recorded:
        return None
    return max(1, _CACHED_BYTES // bytes_each)


def _fused(
    operator: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, shortcut: Tensor | None
) -> Tensor:
    result: Tensor
    if shortcut is None:
        result = operator(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
    else:
        result = operator.binary(x, shortcut, weight, bias, "add")
    return result


def _plain_inference(x: Tensor, layer: nn.Linear) -> bool:
    """Tell whether nothing but the numbers of a float32 product on a processor is wanted."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.shape[-1] == layer.in_features  # otherwise the plain layer says what is wrong
        and (layer.bias is None or layer.bias.is_contiguous())  # the operator reads it as if it were
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and type(x) is Tensor  # types of others stand for something else than their numbers
        and type(layer.weight) is nn.Parameter
        and not torch._C._len_torch_dispatch_stack()  # FLOP counters, fake tensors
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, jvp
        and forward_ad._current_level < 0  # derivatives that need no graph
    )


@cache
def _onednn_linear() -> Any | None:
    """Return oneDNN's linear operator, or None where this PyTorch has none that computes what it should."""
    # No random numbers, and no default device or type: the answer must not depend on where the first call came from.
    x = torch.linspace(-1, 1, 12, device="cpu", dtype=torch.float32).view(2, 2, 3)
    weight, bias = x[0] + 0.5, x[0, 0, :2]
    shortcut = 2 * x[:, :, :2]
    plain = F.linear(x, weight, bias)
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        right = (
            torch.allclose(_fused(operator, x, weight, bias, False, None), plain, atol=1e-6)
            and torch.allclose(_fused(operator, x, weight, bias, True, None), F.gelu(plain), atol=1e-6)
            and torch.allclose(_fused(operator, x, weight, bias, False, shortcut), shortcut + plain, atol=1e-6)
        )
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return None
    return operator if right else None
