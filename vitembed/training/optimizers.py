"""The optimizers of a training: torch's AdamW, and Muon, whose steps of matrices are made orthogonal.

A gradient of a matrix has a few large directions and many small ones. Muon takes a step of about equal length in all of
them, and so learns more from as many images where a network starts from nothing (benchmarks/RESULTS.md, Omniglot).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS = ("adamw", "muon")

MOMENTUM = 0.95
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW: torch's defaults

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan's iteration: the steepest at 0, values in about [0.7, 1.2]
_ITERATIONS = 5
_RMS = 0.2  # of an entry of AdamW's steps, as Liu et al. measured it


def build_optimizer(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimizer of groups of parameters, as `parameter_groups` sorts them.

    "adamw" is AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
    """
    return Muon(groups) if name == "muon" else torch.optim.AdamW(groups)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with AdamW for what is no matrix.

    A step of an (m, n) matrix is scaled by 0.2 sqrt(max(m, n)), so that its entries are about as large as AdamW's, and
    learning rate and weight decay mean the same for both (Liu et al. 2025, arXiv:2502.16982, "Muon is Scalable for LLM
    Training"). A convolution is taken as the matrix (output channels, the rest), and queries, keys and values of a
    layer as the one matrix that they are stored in. torch's own `torch.optim.Muon`, from 2.9 on, has neither
    convolutions nor the AdamW beside.

    Args:
        groups: dictionaries with "params", "lr", "weight_decay" and "matrices": whether Muon takes the group; then its
            parameters must have two dimensions at least.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; what has no gradient stays as it is.

        Returns:
            What the closure returned, which computes the gradients first; None without one.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = self._muon(parameter) if group["matrices"] else self._adam(parameter)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled, as in AdamW
                    parameter.sub_(change, alpha=group["lr"])
        return value

    def _muon(self, parameter: nn.Parameter) -> Tensor:
        """Return the step of a matrix for a learning rate of 1, with Nesterov's momentum."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)
        return (_RMS * math.sqrt(max(ahead.shape)) * orthogonalized(ahead)).view_as(parameter)

    def _adam(self, parameter: nn.Parameter) -> Tensor:
        """Return Adam's step for a learning rate of 1 (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        steps = float(state["step"])
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - BETAS[1])
        mean = state["mean"] / (1 - BETAS[0] ** steps)
        change: Tensor = mean / ((state["square"] / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)
        return change


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return about U V^T for a matrix U S V^T: its singular values come out between 0.7 and 1.2.

    Five of Jordan's quintic Newton-Schulz iterations, x -> a x + b x^3 + c x^5 on the singular values, from the matrix
    divided by its Frobenius norm. Singular values below some hundredth of that norm come out smaller.

    Args:
        matrix: (m, n), any floating type.

    Returns:
        (m, n) of the same type. On a processor float32 is computed in float32, on other devices in bfloat16.
    """
    a, b, c = _QUINTIC
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # the products below are as large as the shorter side
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
