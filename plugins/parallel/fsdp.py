"""Parameters, gradients and optimizer states shared out among data ranks (ZeRO stage 3, arXiv:1910.02054, section 5.3).

The model keeps, under the addresses of the whole one, this rank's rows of each parameter: what the optimizer steps and
a checkpoint holds. Reading `module.weight` makes the parameters of its unit whole, and lets go of those of others. So
that backward has them too, what a phase returns asks, when its gradient comes, for the units that the phase read.

Torch's own FSDP2 was tried, and is not used. It works in hooks on `forward`, which phases call of an embedding and
never of a block: the embedding's gradient was summed before the step was over, and a block's not at all. It also puts
other parameters in the place of the model's each time it gathers or lets go, which all who know parameters by their
address would have to follow, and it cannot lay out a model without processes.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from tangram.core.block import Block
from tangram.core.context import Parallel
from tangram.core.contracts import Sharding
from tangram.core.islands import tensors
from tangram.core.model import Model
from tangram.core.records import Carry, GradientNorm, Phase
from tangram.core.registry import component
from tangram.plugins.parallel.holders import Named, clip, messages, packed_gradients, rows_of, unpack_gradients
from tangram.plugins.parallel.units import Unit, Weight


@component("sharding", use="fsdp", capabilities=["ranks"])
@frozen(kw_only=True)
class FSDPConfig:
    """Keep on each data rank some rows of every parameter, with their gradients and optimizer states.

    A block is whole while it is worked, forward and once more backward. Ranks elsewhere in a pipeline that hold the
    same stage keep the same rows; of experts, those that hold the same share of them divide it. The optimizer must step
    each element by itself.
    """

    def build(self, parallel: Parallel) -> Sharding:
        """Build it."""
        return FSDP(parallel)


class FSDP:
    """Rows of every parameter; those of a unit are whole while a phase that reads one of them is at work."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._units: list[Unit] = []
        self._at_work: list[Unit] = []
        self._kept: list[Named] = []
        self._rows: Mapping[str, range] = {}
        self._copies: list[tuple[tuple[int, ...], list[Named]]] = []

    def attach(self, model: Model) -> Sequence[tuple[str, nn.Parameter]]:
        """Leave the model this rank's rows, and return them with their addresses.

        Raises:
            ValueError: A parameter has no rows.
        """
        layout, shares, places = self._parallel.layout, model.shares(), _places(model)
        units = defaultdict[tuple[str, tuple[int, ...], torch.dtype], list[Named]](list)
        copies = defaultdict[tuple[int, ...], list[str]](list)
        for address, parameter in model.named_parameters():
            holders = layout.holders(model.stages_of(address), address in shares)
            copies[tuple(rank for rank in holders if rank % layout.data_ranks == layout.data_rank)].append(address)
            peers = tuple(rank for rank in holders if rank // layout.data_ranks == layout.pipeline_rank)
            if len(peers) > 1:
                units[places[address], peers, parameter.dtype].append((address, parameter))
        self._units = [Unit(ranks, named, self._parallel) for (_, ranks, _), named in units.items()]
        firsts = {address: experts.start for address, experts in shares.items()}
        self._rows = dict(rows_of(model, self._parallel)) | {
            weight.address: range(first + weight.rows.start, first + weight.rows.stop)
            for unit in self._units
            for weight in unit.weights
            for first in (firsts.get(weight.address, 0),)
        }
        self._watch(model, [parameter for named in units.values() for _, parameter in named])
        self._kept = [named for named in model.named_parameters() if named[1].numel()]
        kept = dict(self._kept)
        for ranks in sorted(copies):
            self._copies.append((ranks, [(address, kept[address]) for address in copies[ranks] if address in kept]))
        for ranks in (*copies, *(unit.ranks for unit in self._units)):
            self._parallel.groups.want(ranks)
        return self._kept

    def _watch(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        """Give the modules their rows in place of these parameters, and whoever reads one there the whole one."""
        weights = [(unit, weight) for unit in self._units for weight in unit.weights]
        found = dict(zip(parameters, weights, strict=True))
        for module in model.modules():
            here = {name: found[p] for name, p in module.named_parameters(recurse=False) if p in found}
            for name, (_, weight) in here.items():
                setattr(module, name, weight.kept)
            if here:
                kind, reads = type(module), {name: property(self._reader(*one)) for name, one in here.items()}
                module.__class__ = type(kind.__name__, (kind,), {**reads, "__module__": kind.__module__})
        model.around = self._around

    def _reader(self, unit: Unit, weight: Weight) -> Callable[[nn.Module], nn.Parameter]:
        def read(_: nn.Module) -> nn.Parameter:
            if unit not in self._at_work:
                self._at_work.append(unit)
            self._have(self._at_work)
            return weight.whole

        return read

    def _have(self, units: Collection[Unit]) -> None:
        """Have these units whole; of the others none, if one was not."""
        if not all(unit.whole for unit in units):
            self._let_go_of_all_but(units)
            for unit in units:
                unit.gather()

    def _let_go_of_all_but(self, units: Collection[Unit] = ()) -> None:
        for unit in self._units:
            if unit.whole and unit not in units:
                unit.let_go()

    def _around(self, phases: list[Phase]) -> list[Phase]:
        """Return the phases, each with the units that it reads whole, also in its backward."""
        return [phase._replace(fn=self._watched(phase.fn, phase is phases[-1])) for phase in phases]

    def _watched(self, fn: Callable[[Carry], Carry], last: bool) -> Callable[[Carry], Carry]:
        def run(carry: Carry) -> Carry:
            self._at_work = []
            after = fn(carry)
            if torch.is_grad_enabled():
                before = set(map(id, tensors(carry)))
                self._ask_for(self._at_work, [made for made in tensors(after) if id(made) not in before])
            elif last:  # weights may be exchanged between two evaluations
                self._let_go_of_all_but()
            return after

        return run

    def _ask_for(self, units: Sequence[Unit], made: Sequence[Tensor]) -> None:
        """Have the units whole when the gradient of anything that was made with them comes.

        Backward takes up what was made last first, so it works a phase through before it comes to the one before; and
        of a phase it begins with something that the phase returned.
        """

        def back(_: Tensor) -> None:
            self._at_work = list(units)
            self._have(units)
            for unit in units:
                unit.owes = True

        for tensor in made if units else ():
            if tensor.requires_grad:
                tensor.register_hook(back)

    def owned(self) -> Collection[str]:
        """Return the addresses of which this rank writes its rows: of ranks that keep the same ones the first does."""
        return frozenset(address for address, _ in self._counted())

    def rows(self) -> Mapping[str, range]:
        """Return the rows that are kept here."""
        return self._rows

    def _counted(self) -> list[Named]:
        rank = self._parallel.layout.rank
        return [each for ranks, named in self._copies if ranks[0] == rank for each in named]

    def reduce(self) -> None:
        """Sum what gradients are not summed yet, in float32; then no parameter is whole."""
        self._let_go_of_all_but()
        for ranks in sorted({unit.ranks for unit in self._units}):
            units = [unit for unit in self._units if unit.ranks == ranks]
            late = torch.tensor([float(unit.late) for unit in units], device=self._parallel.device)
            for unit, some in zip(units, self._parallel.groups.largest(late, ranks).tolist(), strict=True):
                if some:
                    unit.reduce()
                unit.settle()
        for ranks, named in self._copies:
            if len(ranks) > 1:
                for piece in messages(named):
                    unpack_gradients(piece, self._parallel.groups.sum(packed_gradients(piece), ranks))

    def clip(self, limit: float) -> GradientNorm:
        """Scale the gradients down to a global L2 norm of `limit`; leave them if the norm is not finite."""
        return clip(self._counted(), self._kept, limit, self._parallel)

    def gather(self) -> None:
        """Do nothing: what is kept was stepped, and nothing is whole between steps."""


def _places(model: Model) -> dict[str, str]:
    """Return which unit each address is in: its block, or beside a block what has the block, or its own module."""
    blocks = [address for address, module in model.named_modules() if isinstance(module, Block)]
    found = {}
    for address, _ in model.named_parameters():
        owner = address.rpartition(".")[0]
        block = next((block for block in blocks if owner.startswith(f"{block}.")), "")
        found[address] = block or owner.rpartition(".")[0] or owner
    return found
