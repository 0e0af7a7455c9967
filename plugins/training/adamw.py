"""AdamW (arXiv:1711.05101), with moments in float32 or, as DeepSeek-V3 keeps them, in bfloat16."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal, overload

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_, le
from torch import Tensor, nn

from tangram.core.registry import component
from tangram.kernels import adamw_step

COARSE = 0.98
"""Largest second decay rate that bfloat16 moments bear: past it a step moves a moment by less than its rounding."""

Noise = Callable[[Tensor, int], torch.Generator]
"""Gives the random numbers by which the moments of a weight are rounded at a step."""


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse decay rates outside [0, 1).

    Raises:
        ValueError: One is.
    """
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {list(betas)}")


def step_adamw(
    state: MutableMapping[Any, dict[str, Any]],
    parameters: Sequence[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: torch.dtype | None = None,
    noise: Noise | None = None,
) -> None:
    """Step the parameters that have a gradient, whose moments and number of steps are in an optimizer's state.

    Args:
        state: Of the optimizer; it is filled as weights take their first step.
        parameters: Weights of one dtype.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times the learning rate.
        moments: Dtype of the moments; that of the weights if left out.
        noise: Rounds the moments at random; otherwise they are rounded to nearest.
    """
    together: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        own = state[parameter]
        if not own:
            own["step"] = torch.zeros((), dtype=torch.float32)
            own["exp_avg"] = torch.zeros_like(parameter, dtype=moments)
            own["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments)
        own["step"] += 1
        together.setdefault(int(own["step"]), []).append(parameter)
    for step, same in together.items():
        # Random numbers are drawn weight by weight, and then no weight's depend on which others there are.
        for stepped in [same] if noise is None else [[parameter] for parameter in same]:
            adamw_step(
                stepped,
                [parameter.grad for parameter in stepped if parameter.grad is not None],
                [state[parameter]["exp_avg"] for parameter in stepped],
                [state[parameter]["exp_avg_sq"] for parameter in stepped],
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                step=step,
                stochastic=None if noise is None else noise(stepped[0], step),
            )


@component("optimizer", use="adamw")
@frozen(kw_only=True)
class AdamWConfig:
    """AdamW; matrices decay, norms do not.

    Attributes:
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of tensors with two dimensions or more, times the learning rate.
        moments: Dtype that keeps the moments between steps. With bfloat16 the update is still computed in float32,
            on float32 weights (arXiv:2412.19437, section 3.3.3).
        rounding: How moments become bfloat16. To nearest, a second moment does not follow a decay rate above 0.98;
            stochastic, up or down at random, it is right on average at any.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, validator=[gt(0.0), le(1.0)])
    weight_decay: float = field(default=0.1, validator=[ge(0.0), le(100.0)])
    moments: Literal["float32", "bfloat16"] = field(default="float32", validator=in_(("float32", "bfloat16")))
    rounding: Literal["nearest", "stochastic"] = field(default="nearest", validator=in_(("nearest", "stochastic")))

    def __attrs_post_init__(self) -> None:
        check_betas(self.betas)
        if self.rounding == "stochastic" and self.moments == "float32":
            raise ValueError("rounding: stochastic is for moments: bfloat16; moments in float32 are not rounded")

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> "AdamW":
        """Build it; the learning rate is set before every step."""
        if self.moments == "bfloat16" and self.rounding == "nearest" and self.betas[1] > COARSE:
            warnings.warn(
                f"moments: bfloat16 rounds to nearest and does not follow betas[1] = {self.betas[1]}: take "
                f"rounding: stochastic, moments: float32, or a rate of at most {COARSE}",
                stacklevel=2,
            )
        return AdamW(self, parameters)


class Optimizer(torch.optim.Optimizer):
    """torch's own, but for a wait: its wrapped methods import the compiler, for seconds, to keep it out of them."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Optimizer):
    """Steps every weight by AdamW.

    Args:
        config: The settings.
        parameters: Weights with their addresses.
    """

    def __init__(self, config: AdamWConfig, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        matrices = [p for _, p in parameters if p.ndim >= 2]
        vectors = [p for _, p in parameters if p.ndim < 2]
        groups: list[dict[str, object]] = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self.config = config
        self._addresses: dict[Tensor, str] = {parameter: address for address, parameter in parameters}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            step_adamw(
                self.state,
                group["params"],
                lr=group["lr"],
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=group["weight_decay"],
                moments=torch.bfloat16 if self.config.moments == "bfloat16" else None,
                noise=self._noise if self.config.rounding == "stochastic" else None,
            )
        return loss

    def _noise(self, parameter: Tensor, step: int) -> torch.Generator:
        # From the address and the step alone: the order of the weights says nothing, and a resume needs no state of it.
        digest = hashlib.sha256(f"{self._addresses[parameter]}:{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
