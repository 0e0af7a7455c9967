"""What every component inside the model owes, whatever its slot."""

from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen
from hypothesis import assume
from torch import Tensor, nn

from tangram.core.autograd import Recompute
from tangram.core.context import Context
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import module as mutants
from tangram.testing.samples import context, filled, normal
from tangram.testing.strategies import seeds

_STEP = 1e-5
"""Of a difference that stands for a derivative: rounding leaves 1e-11 of a value, and curvature 1e-10."""


class ModuleContract(Contract):
    """A component that is an `nn.Module`, built from a context.

    Attributes:
        dim: Width D of the model around it.
    """

    dim = 6

    @classmethod
    def make(cls, config: Any, ctx: Context | None = None) -> Any:
        """Return what the config builds."""
        return cls.placed(config.build(ctx or cls.context()))

    @classmethod
    def context(cls, *, recompute: str = "none") -> Context:
        """Return small surroundings in the contract's dtype."""
        return context(cls.dim, compute=cls.dtype, recompute=recompute)

    @classmethod
    def built(cls, config: Any, seed: int = 0) -> Any:
        """Return what the config builds, with visible weights that depend on the seed alone."""
        return filled(cls.make(config), seed)

    @law(kills=[mutants.allocates_at_once])
    def it_builds_without_memory(self, config: object) -> None:
        """Built on the device `meta`, it has the same tensors as elsewhere, and none in memory."""
        with torch.device("meta"):
            bare = self.make(config)
        real = self.make(config)
        assert all(tensor.is_meta for tensor in _tensors(bare).values()), "a tensor was made on a device of its own"
        assert {k: t.shape for k, t in _tensors(bare).items()} == {k: t.shape for k, t in _tensors(real).items()}

    @law(kills=[mutants.forgets_a_tensor_in_reset])
    def every_tensor_is_set_by_reset_parameters(self, config: object) -> None:
        """`reset_parameters` of its modules sets every tensor, for models are built without memory first."""
        with torch.device("meta"):
            module = self.make(config)
        # As a model does it, on the CPU whatever the device. `to_empty` imports torch's symbolic shapes to make one
        # tensor like another without memory.
        module._apply(_unset)
        for part in module.modules():
            if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                assert callable(getattr(part, "reset_parameters", None)), f"{type(part).__name__} cannot be reset"
                part.reset_parameters()
        left = [name for name, tensor in _tensors(module).items() if not bool(tensor.isfinite().all())]
        assert not left, f"reset_parameters leaves {', '.join(left)} as it was"

    @law(seed=seeds(), kills=[mutants.keeps_a_tensor_to_itself])
    def its_state_makes_another_one_equal(self, config: object, seed: int) -> None:
        """Its state dict, loaded into another one, makes the two alike in every tensor."""
        one, other = self.built(config, seed), self.built(config, seed + 1)
        other.load_state_dict(one.state_dict())
        for name, tensor in _tensors(one).items():
            assert torch.equal(tensor, _tensors(other)[name]), f"{name} is not in the state dict"

    @law(seed=seeds(), kills=[mutants.draws_from_elsewhere])
    def the_same_seed_gives_the_same_weights(self, config: object, seed: int) -> None:
        """Its initial weights are drawn from torch's generator: the same seed, the same weights."""
        states = []
        for _ in range(2):
            torch.manual_seed(seed)
            states.append(self.make(config).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@frozen(eq=False)
class Passed:
    """What went through a component.

    Attributes:
        leaves: Inputs that ask for a gradient, by name.
        outputs: Outputs that have one, by name; `out` goes on through the model.
        choices: What was chosen, by name: where it changes, values jump.
    """

    leaves: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    choices: Mapping[str, Tensor] = field(factory=dict)


class DifferentiableContract(ModuleContract):
    """A component that hidden states pass through.

    Attributes:
        length: Terms of the longest chain of reductions, there and back, of what `passed` does.
    """

    length = 200

    def passed(self, module: Any, seed: int) -> Passed:
        """Put drawn inputs through the module; the same for the same seed."""
        raise NotImplementedError

    def gradients(self, module: Any, seed: int, recompute: Recompute | None = None) -> dict[str, Tensor | None]:
        """Return the outputs, and the gradients of one direction of theirs at inputs and parameters, by name."""
        recompute = recompute or Recompute()
        with recompute.scope():
            passed = recompute.whole(self.passed, module, seed)
        wrt = {**passed.leaves, **dict(module.named_parameters())}
        grads = torch.autograd.grad(_along(passed, seed), list(wrt.values()), allow_unused=True)
        return {**passed.outputs, **{f"gradient of {name}": grad for name, grad in zip(wrt, grads, strict=True)}}

    @law(seed=seeds(), kills=[mutants.loses_a_gradient])
    def every_parameter_has_a_gradient(self, config: object, seed: int) -> None:
        """Every parameter has a gradient, and some example where it is not zero."""
        module = self.built(config, seed)
        seen = dict.fromkeys((name for name, _ in module.named_parameters()), 0.0)
        for draw in range(4):  # a parameter of an expert may have no token in one of them
            gradients = self.gradients(module, seed + draw)
            for name in seen:
                grad = gradients[f"gradient of {name}"]
                assert grad is not None, f"{name} has no gradient"
                seen[name] += float(grad.abs().sum())
            if all(seen.values()):
                return
        dead = [name for name, total in seen.items() if not total]
        assert not dead, f"the gradient of {', '.join(dead)} is zero whatever passes"

    @law(seed=seeds(), kills=[mutants.doubles_a_gradient])
    def its_gradients_are_those_of_its_values(self, config: object, seed: int) -> None:
        """In float64 its gradients along a direction are the differences of its values."""
        if self.dtype is not torch.float64:
            return
        module = self.built(config, seed)
        gradients = self.gradients(module, seed)
        names = [name for name, _ in module.named_parameters()]
        if self._difference(module, seed, names, gradients):  # along all of them at once; then who it is
            wrong = [error for name in names if (error := self._difference(module, seed, [name], gradients))]
            raise AssertionError("; ".join(wrong) or "along all parameters")

    def _difference(self, module: Any, seed: int, names: list[str], gradients: Mapping[str, Tensor | None]) -> str:
        """Return how the gradients along a drawn direction differ from the differences of values; empty if little."""
        parameters = [module.get_parameter(name) for name in names]
        # Not the direction of the weights: along those a norm is flat.
        directions = [self.placed(normal(*each.shape, seed=~seed - i)) for i, each in enumerate(parameters)]
        size = torch.stack([direction.square().sum() for direction in directions]).sum().sqrt() if names else 1.0
        passed, values = self.passed(module, seed), []
        for step in (_STEP, -_STEP):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(step * direction / size)
                moved = self.passed(module, seed)
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.sub_(step * direction / size)
            assume(all(torch.equal(passed.choices[key], moved.choices[key]) for key in passed.choices))
            values.append(float(_along(moved, seed)))
        slope, expected, norm = (values[0] - values[1]) / (2 * _STEP), 0.0, 0.0
        for name, direction in zip(names, directions, strict=True):
            grad = gradients[f"gradient of {name}"]
            assert grad is not None, f"{name} has no gradient"
            expected += float((grad * direction / size).sum())
            norm = max(norm, float(grad.norm()))
        # Central differences err by the third derivative times the step squared, and by rounding over the step.
        if abs(slope - expected) <= 1e-6 * max(1.0, abs(values[0]), norm):
            return ""
        return f"along {', '.join(names)}: {expected:.9g}, differences say {slope:.9g}"

    @law(seed=seeds(), kills=[mutants.remembers_what_passed])
    def its_forward_changes_nothing(self, config: object, seed: int) -> None:
        """A forward writes no parameter, no buffer, no attribute, and draws from no generator."""
        module = self.built(config, seed)
        before = {name: tensor.clone() for name, tensor in _tensors(module).items()}
        attributes = _attributes(module)
        state = torch.random.get_rng_state()
        first, second = (self.passed(module, seed).outputs for _ in range(2))
        assert torch.equal(state, torch.random.get_rng_state()), "it draws from the global generator"
        assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(module).items()), "it writes a tensor"
        assert attributes == _attributes(module), "it writes an attribute"
        assert all(torch.equal(first[name], second[name]) for name in first), "a second forward says otherwise"

    @law(seed=seeds(), kills=[mutants.widens_its_output])
    def it_keeps_the_dtype(self, config: object, seed: int) -> None:
        """What comes out of it and goes on through the model has the dtype that went in."""
        outputs = self.passed(self.built(config, seed), seed).outputs
        assert outputs["out"].dtype is self.dtype, f"{outputs['out'].dtype} for {self.dtype}"

    @law(seed=seeds(), kills=[mutants.recomputes_otherwise, mutants.passes_otherwise_a_second_time])
    def recomputation_changes_nothing(self, config: object, seed: int) -> None:
        """Where parts of it, or all of it, run again in backward, outputs and gradients are the same, bit for bit."""
        plain = self.built(config, seed)
        expected = self.gradients(plain, seed)
        for policy in ("selective", "full"):
            ctx = self.context(recompute=policy)
            again = self.make(config, ctx)
            again.load_state_dict(plain.state_dict())
            actual = self.gradients(again, seed, ctx.recompute)
            for name, value in expected.items():
                other = actual[name]
                same = value is other if value is None or other is None else torch.equal(value, other)
                assert same, f"{name} differs under {policy}"


def _along(passed: Passed, seed: int) -> Tensor:
    """Return the sum of all outputs, each times a drawn direction."""
    outputs = passed.outputs.values()
    return torch.stack([(out * normal(*out.shape, seed=seed + i).to(out)).sum() for i, out in enumerate(outputs)]).sum()


def _unset(bare: Tensor) -> Tensor:
    return torch.full(bare.shape, float("nan") if bare.is_floating_point() else 0, dtype=bare.dtype)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _attributes(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return which objects every module holds, by identity; of a container its content too."""
    found: dict[str, dict[str, int]] = {}
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if not key.startswith("_") or key == "_buffers"}
        found[name] = {key: id(value) for key, value in own.items()}
        found[name] |= {f"{key}.len": len(value) for key, value in own.items() if isinstance(value, list | dict)}
    return found
