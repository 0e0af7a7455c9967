"""Dispatchers with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from tangram.core.contracts import Dispatcher
from tangram.core.records import Rows


class _Changed:
    """A dispatcher that does one of its two works otherwise."""

    def __init__(
        self,
        dispatch: Callable[[Tensor, Tensor], Rows],
        combine: Callable[[Rows, Tensor], Tensor],
    ) -> None:
        self.dispatch, self.combine = dispatch, combine


def loses_a_token(dispatcher: Dispatcher) -> Any:
    """Tokens beyond an expert's capacity are dropped."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        capacity = int(rows.counts.max()) - 1
        begins = rows.counts.cumsum(0) - rows.counts
        place = torch.arange(len(rows.rows)) - begins.repeat_interleave(rows.counts)
        return evolve(rows, rows=rows.rows * (place < capacity)[:, None])

    return _Changed(dispatch, dispatcher.combine)


def doubles_a_token(dispatcher: Dispatcher) -> Any:
    """The first row is there in the place of the second, too."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        return evolve(rows, rows=torch.cat([rows.rows[:1], rows.rows[:1], rows.rows[2:]])[: len(rows.rows)])

    return _Changed(dispatch, dispatcher.combine)


def miscounts_an_expert(dispatcher: Dispatcher) -> Any:
    """An expert is said to have as many rows as the one before it."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        return evolve(rows, counts=rows.counts.roll(1))

    return _Changed(dispatch, dispatcher.combine)


def weighs_by_place(dispatcher: Dispatcher) -> Any:
    """A gate weighs the expert beside its own."""
    return _Changed(dispatcher.dispatch, lambda rows, gates: dispatcher.combine(rows, gates.roll(1, 0)))


def weighs_all_alike(dispatcher: Dispatcher) -> Any:
    """The sums are taken without the gates."""
    return _Changed(dispatcher.dispatch, lambda rows, gates: dispatcher.combine(rows, torch.ones_like(gates)))


def detaches_the_gates(dispatcher: Dispatcher) -> Any:
    """The gates get no gradient: the router is detached from the loss."""
    return _Changed(dispatcher.dispatch, lambda rows, gates: dispatcher.combine(rows, gates.detach()))


def averages_gradients(dispatcher: Dispatcher) -> Any:
    """A token's gradient is half of the sum over its experts."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        return dispatcher.dispatch(x.detach() + 0.5 * (x - x.detach()), ids)

    return _Changed(dispatch, dispatcher.combine)


def sends_gradient_through_the_handle(dispatcher: Dispatcher) -> Any:
    """The handle holds the tokens, with their gradient."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        return evolve(rows, handle=(rows.handle, x))

    def combine(rows: Rows, gates: Tensor) -> Tensor:
        assert isinstance(rows.handle, tuple)
        handle, x = rows.handle
        assert isinstance(x, Tensor)
        return dispatcher.combine(evolve(rows, handle=handle), gates) + 0.0 * x

    return _Changed(dispatch, combine)


def remembers_the_last_one(dispatcher: Dispatcher) -> Any:
    """Rows are sent home the way of the last ones that went out."""
    handles: list[object] = []

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        handles.append(rows.handle)
        return rows

    return _Changed(dispatch, lambda rows, gates: dispatcher.combine(evolve(rows, handle=handles[-1]), gates))


def widens_to_the_gates(dispatcher: Dispatcher) -> Any:
    """What comes home has the dtype of the gates."""
    return _Changed(dispatcher.dispatch, lambda rows, gates: dispatcher.combine(rows, gates).to(gates.dtype))


def turns_round_the_rows_of_an_expert(dispatcher: Dispatcher) -> Any:
    """An expert is given its rows last first."""

    def turned(rows: Rows) -> Rows:
        begins = (rows.counts.cumsum(0) - rows.counts).repeat_interleave(rows.counts)
        ends = rows.counts.cumsum(0).repeat_interleave(rows.counts)
        return evolve(rows, rows=rows.rows[begins + ends - 1 - torch.arange(len(rows.rows))])

    return _Changed(
        lambda x, ids: turned(dispatcher.dispatch(x, ids)),
        lambda rows, gates: dispatcher.combine(turned(rows), gates),
    )


def rounds_coarsely(dispatcher: Dispatcher) -> Any:
    """Rows lose half of what a bit of their mantissa says."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        rows = dispatcher.dispatch(x, ids)
        mantissa, exponent = torch.frexp(rows.rows)
        return evolve(rows, rows=torch.ldexp((mantissa * 4).round() / 4, exponent))

    return _Changed(dispatch, dispatcher.combine)


def comes_home_as_it_went(dispatcher: Dispatcher) -> Any:
    """What experts made is rounded on its way home as their rows were on the way out."""

    def combine(rows: Rows, gates: Tensor) -> Tensor:
        one = torch.zeros(len(rows.rows), 1, dtype=torch.int64)
        return dispatcher.combine(evolve(rows, rows=dispatcher.dispatch(rows.rows, one).rows), gates)

    return _Changed(dispatcher.dispatch, combine)


def shares_a_scale(dispatcher: Dispatcher) -> Any:
    """All rows are rounded with the scale of the largest, so that each depends on those that it travels with."""

    def dispatch(x: Tensor, ids: Tensor) -> Rows:
        step = 2**-12 * x.detach().abs().amax() if len(x) else 1.0
        return dispatcher.dispatch(x + ((x / step).round() * step - x).detach(), ids)

    return _Changed(dispatch, dispatcher.combine)
