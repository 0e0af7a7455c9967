"""What every balancer owes: biases that move against the load, and nothing else that moves them."""

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Balancer
from tangram.core.records import Progress, violation
from tangram.testing.contracts.module import ModuleContract
from tangram.testing.laws import law
from tangram.testing.mutants import balancer as mutants
from tangram.testing.samples import context, normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close

_EXPERTS = 6
_LOADS = st.lists(st.integers(0, 40), min_size=_EXPERTS, max_size=_EXPERTS)

MOMENTS = tuple(Progress(step=step, tokens=10**6 * step) for step in (0, 1, 10, 100, 1000, 10**5, 10**7))
"""Where its speed is looked for: a curve may begin and end at zero."""


class BalancerContract(ModuleContract):
    """The laws of the slot `balancer`."""

    slot = "balancer"

    @classmethod
    def make(cls, config: Any, ctx: Context | None = None) -> Any:
        """Return what the config builds."""
        return cls.placed(config.build(ctx or cls.context(), _EXPERTS))

    def now(self, config: Any) -> Progress:
        """Return a moment at which a skewed load moves its biases; some moment if it is not adaptive.

        Raises:
            AssertionError: It says that it adapts, and no load ever moves it.
        """
        if not self.make(config).adaptive:
            return MOMENTS[0]
        for now in MOMENTS:
            module = self.make(config)
            module.update(self.placed(torch.tensor([50, *[2] * (_EXPERTS - 1)])), now)
            if bool(module.bias().any()):
                return now
        raise AssertionError("it says that it is adaptive, and no load moves it")

    def moved(self, config: Any, *loads: Tensor) -> Balancer:
        """Return the balancer after steps with these loads."""
        module, now = self.make(config), self.now(config)
        for load in loads:
            module.update(self.placed(load), now)
        assert isinstance(module, Balancer)
        return module

    @law(compute=st.sampled_from((torch.bfloat16, torch.float32)), kills=[mutants.follows_the_model_down])
    def biases_are_float32(self, config: Any, compute: torch.dtype) -> None:
        """The biases are float32 [E] without a gradient, zero at first, whatever the model computes in."""
        bias = self.make(config, context(self.dim, compute=compute)).bias()
        assert bias.dtype is torch.float32, f"they are {bias.dtype}"
        assert bias.shape == (_EXPERTS,)
        assert not bias.requires_grad, "they ask for a gradient"
        assert not bool(bias.any()), "they begin elsewhere"

    @law(loads=st.lists(_LOADS, min_size=1, max_size=4), kills=[mutants.starts_anew_after_a_checkpoint])
    def biases_are_in_the_state_dict(self, config: Any, loads: list[list[int]]) -> None:
        """What a state dict brings back has the biases of the one that it was taken from."""
        module, restored = self.moved(config, *torch.tensor(loads)), self.make(config)
        restored.load_state_dict(module.state_dict())
        assert torch.equal(restored.bias(), module.bias()), "the biases are not in the state dict"

    @law(count=st.integers(0, 2**40), kills=[mutants.moves_under_an_equal_load])
    def an_equal_load_moves_nothing(self, config: Any, count: int) -> None:
        """Where every expert has the same load, no bias moves."""
        bias = self.moved(config, torch.full((_EXPERTS,), count)).bias()
        assert not bool(bias.any()), f"biases {bias.tolist()} after a load of {count} each"

    @law(
        loads=_LOADS,
        kills=[mutants.never_updates, mutants.raises_the_overloaded],
    )
    def the_overloaded_falls_and_the_starved_rises(self, config: Any, loads: list[int]) -> None:
        """The bias of the expert with the largest load falls below that of the one with the smallest, if it adapts."""
        load = torch.tensor(loads)
        assume(int(load.max()) > int(load.min()))
        module = self.moved(config, load)
        bias = module.bias()
        if not module.adaptive:
            assert not bool(bias.any()), "it says that it is not adaptive, and moves"
            return
        most, least = float(bias[load.argmax()]), float(bias[load.argmin()])
        assert most < least, f"{most} for a load of {int(load.max())}, {least} for one of {int(load.min())}"

    @law(base=st.integers(2**25, 2**40), kills=[mutants.counts_in_float32])
    def one_token_among_billions_is_seen(self, config: Any, base: int) -> None:
        """Loads are exact far beyond what float32 counts: a difference of one token moves the biases."""
        load = torch.full((_EXPERTS,), base)
        load[0] += 1
        module = self.moved(config, load)
        bias = module.bias()
        assert not module.adaptive or bool((bias[0] < bias[1:]).all()), f"biases {bias.tolist()}"

    @law(loads=_LOADS, kills=[mutants.moves_when_it_is_read])
    def only_update_moves_it(self, config: Any, loads: list[int]) -> None:
        """Reading the biases, or asking for the state, moves nothing."""
        module = self.moved(config, torch.tensor(loads))
        before = module.bias().clone()
        for _ in range(3):
            module.state_dict()
            module()
        module.train(not module.training)
        assert torch.equal(module.bias(), before), "reading moves it"

    @law(
        loads=st.lists(_LOADS, min_size=1, max_size=3),
        order=st.permutations(range(_EXPERTS)),
        kills=[mutants.forgets_the_last_expert],
    )
    def no_expert_is_special(self, config: Any, loads: list[list[int]], order: list[int]) -> None:
        """With the experts in another order the biases are the same, in that order."""
        table, permutation = self.placed((torch.tensor(loads), torch.tensor(order)))
        one, other = self.moved(config, *table), self.moved(config, *table[:, permutation])
        assert_close(other.bias(), one.bias()[permutation], length=_EXPERTS * len(loads))

    @law(seed=seeds(), kills=[mutants.never_updates, mutants.raises_the_overloaded])
    def a_skewed_load_becomes_even(self, config: Any, seed: int) -> None:
        """Under tokens that prefer two experts, by no more than some steps can mend, the load becomes more even."""
        module, now = self.make(config), self.now(config)
        if not module.adaptive:
            return
        first = self.moved(config, torch.tensor([60, 60, *[2] * (_EXPERTS - 2)])).bias()
        step = float(first.max() - first.min())  # its speed decides what it can mend
        affinity = self.placed(10 * step * normal(128, _EXPERTS, seed=seed))
        affinity[:, :2] += 15 * step
        loads = []
        for _ in range(120):
            ids = (affinity + module.bias()).topk(2).indices
            loads.append(torch.bincount(ids.flatten(), minlength=_EXPERTS))
            module.update(loads[-1], now)
        before, after = float(violation(loads[0])), float(violation(torch.stack(loads[-20:]).sum(0)))
        assert after < before / 3, f"violation {before:.3g} at first, {after:.3g} at last"
