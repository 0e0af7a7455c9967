"""AdamW (arXiv:1711.05101)."""

from collections.abc import Sequence

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import nn

from tangram.core.registry import component


@component("optimizer", use="adamw")
@frozen(kw_only=True)
class AdamWConfig:
    """AdamW; matrices decay, norms do not.

    Attributes:
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of tensors with two dimensions or more, times the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, validator=gt(0.0))
    weight_decay: float = field(default=0.1, validator=ge(0.0))

    def __attrs_post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Build it; the learning rate is set before every step."""
        matrices = [p for _, p in parameters if p.ndim >= 2]
        vectors = [p for _, p in parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=self.betas, eps=self.eps, fused=True
        )
