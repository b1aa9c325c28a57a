"""Attention in training on a processor in bfloat16: our way beside torch's fused kernel, forward and backward.

    python benchmarks/attention.py

The two take turns within one process; a figure is a ratio of medians. Half a minute on one core.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import alternate, machine
from torch import Tensor

from vitembed.vit.kernels import attention

SHAPES = ((256, 3, 17, 64), (256, 3, 37, 64), (128, 3, 65, 64), (64, 6, 197, 64))  # (B, h, T, d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs=4, action="append", metavar=("B", "H", "T", "D"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    print(machine())
    print(f"{'images':>6}{'heads':>7}{'tokens':>8}{'width':>7}{'fused':>12}{'ours':>12}{'ratio':>8}")
    for images, heads, tokens, width in options.shapes or SHAPES:
        shape = (images, tokens, heads, width)  # as the projection to queries, keys and values leaves them
        leaves = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(images, heads, tokens, width, dtype=torch.bfloat16)
        times = alternate(
            {
                "fused": timed(F.scaled_dot_product_attention, leaves, gradient),
                "ours": timed(partial(attention, training=True), leaves, gradient),
            },
            repeats=options.repeats,
        )
        fused, ours = 1e3 * times["fused"], 1e3 * times["ours"]
        print(f"{images:>6}{heads:>7}{tokens:>8}{width:>7}{fused:>9.1f} ms{ours:>9.1f} ms{fused / ours:>7.2f}x")


def timed(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    """Return a forward and a backward pass to be timed."""
    return lambda: torch.autograd.grad(function(*(leaf.transpose(1, 2) for leaf in leaves)), leaves, gradient)


if __name__ == "__main__":
    main()
