"""Muon (Keller Jordan, github.com/KellerJordan/Muon) with the update scale of arXiv:2502.16982."""

import math
from collections.abc import Callable, Sequence
from typing import overload

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt
from torch import Tensor, nn

from tangram.core.contracts import Shard
from tangram.core.registry import component
from tangram.plugins.training.adamw import Optimizer, check_betas, step_adamw

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 that lift small singular values fastest and leave none far from 1."""

RMS = 0.2
"""Root mean square of an AdamW update per unit of learning rate, which a matrix's update is scaled to."""


@component("optimizer", use="muon")
@frozen(kw_only=True)
class MuonConfig:
    """Orthogonalise the momentum of matrices (Muon, arXiv:2502.16982); AdamW for all other weights.

    A matrix [A, B] moves by ratio * lr * 0.2 * sqrt(max(A, B)) times its orthogonalised momentum (section 2.2,
    equation 4): with that scale the root mean square of the update is AdamW's, and one learning rate serves both.

    Attributes:
        ratio: Learning rate of the matrices over that of all other weights.
        momentum: Decay rate of the matrices' momentum.
        nesterov: Whether the gradient is mixed into the momentum once more before it is orthogonalised.
        steps: Newton-Schulz iterations.
        weight_decay: Decoupled decay of tensors with two dimensions or more, times their learning rate.
        betas: AdamW's decay rates of the first and the second moment.
        eps: Added to the root of AdamW's second moment.
        adamw_for: Parts of an address, between dots, whose two-dimensional weights AdamW steps all the same. Norms
            (one dimension) and stacks of experts (three) it always steps.
    """

    ratio: float = field(default=1.0, validator=[ge(0.01), le(100.0)])
    momentum: float = field(default=0.95, validator=[ge(0.0), lt(1.0)])
    nesterov: bool = True
    steps: int = field(default=5, validator=gt(0))
    weight_decay: float = field(default=0.1, validator=[ge(0.0), le(100.0)])
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, validator=[gt(0.0), le(1.0)])
    adamw_for: tuple[str, ...] = ("embedding", "head", "centroids")

    def __attrs_post_init__(self) -> None:
        check_betas(self.betas)

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> "Muon":
        """Build it; the learning rate is set before every step.

        Raises:
            ValueError: A matrix is cut.
        """
        if any(isinstance(p, Shard) and self.orthogonalises(address, p) for address, p in parameters):
            raise ValueError(
                "muon orthogonalises whole matrices, and parallel.sharding cuts them: name zero1 there, which shares "
                "them out whole, or another optimizer, such as adamw"
            )
        return Muon(self, parameters)

    def orthogonalises(self, address: str, parameter: Tensor) -> bool:
        """Return whether a weight is a matrix that Muon steps."""
        return parameter.ndim == 2 and not set(self.adamw_for) & set(address.split("."))


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """Return `matrix` [A, B] with its singular values brought near 1 and its singular vectors kept.

    Newton-Schulz: an odd polynomial of a matrix is that polynomial of its singular values. The coefficients do not
    converge to 1; five iterations take all values above 1/500 of the Frobenius norm to between 0.68 and 1.21.
    """
    a, b, c = QUINTIC
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller side makes the square
    x = x / (torch.linalg.matrix_norm(x) + torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(Optimizer):
    """Steps matrices along their orthogonalised momentum, and all other weights as AdamW does.

    Args:
        config: The settings.
        parameters: Weights with their addresses.
    """

    def __init__(self, config: MuonConfig, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        matrices = [p for address, p in parameters if config.orthogonalises(address, p)]
        others = [p for address, p in parameters if not config.orthogonalises(address, p)]
        decay = config.weight_decay
        groups: list[dict[str, object]] = [
            {"params": matrices, "weight_decay": decay, "orthogonalise": True},
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay, "orthogonalise": False},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "orthogonalise": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self.config = config

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["orthogonalise"]:
                for matrix in group["params"]:
                    if matrix.grad is not None:
                        self._matrix(matrix, self.config.ratio * group["lr"], group["weight_decay"])
            else:
                step_adamw(
                    self.state,
                    group["params"],
                    lr=group["lr"],
                    betas=self.config.betas,
                    eps=self.config.eps,
                    weight_decay=group["weight_decay"],
                )
        return loss

    def _matrix(self, matrix: nn.Parameter, lr: float, decay: float) -> None:
        state, grad, momentum = self.state[matrix], matrix.grad, self.config.momentum
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        mean = state["momentum"].lerp_(grad, 1 - momentum)
        direction = grad.lerp(mean, momentum) if self.config.nesterov else mean
        scale = RMS * math.sqrt(max(matrix.shape))
        matrix.mul_(1 - lr * decay).add_(orthogonalised(direction, self.config.steps), alpha=-lr * scale)
