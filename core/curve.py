"""Curve: one value type for learning rate, batch size, loss weights and bias speed over a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from attrs import evolve, field, frozen

if TYPE_CHECKING:
    from tangram.core.records import Progress

Problem: TypeAlias = tuple[tuple[int | str, ...], str]
"""Where in the raw curve (piece, key) something is wrong, and what."""

_UNITS: Mapping[str, Literal["tokens", "steps"]] = {"until": "tokens", "until_step": "steps"}
_SHAPES = ("linear", "cosine")
_FORMS = "`value`, or `from`, `to` and `shape`, with an end `until` (tokens) or `until_step`"


class CurveError(ValueError):
    """A curve that cannot be; `problems` says where and why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{_place(path)}{text}" for path, text in self.problems))


def _place(path: tuple[int | str, ...]) -> str:
    if not path:
        return ""
    piece, *rest = path
    return f"piece {piece}: " + "".join(f"{key}: " for key in rest)


@frozen
class End:
    """Where a piece ends: at exactly `at` the next one holds.

    Attributes:
        at: Tokens consumed or steps taken.
        unit: Which of the two.
    """

    at: int
    unit: Literal["tokens", "steps"]

    def reached(self, now: "Progress") -> bool:
        """Return whether the run has come this far."""
        return self.position(now) >= self.at

    def position(self, now: "Progress") -> int:
        """Return `now` in the unit of this end."""
        return now.tokens if self.unit == "tokens" else now.step


def _float(value: float) -> float:
    """Return one float for every spelling of a number: 3 and 3.0, 0.0 and -0.0."""
    return float(value) + 0.0


@frozen
class Constant:
    """A piece of one value.

    Attributes:
        value: The value.
        until: Its end; None for the last piece.
    """

    value: float = field(converter=_float)
    until: End | None = None


@frozen
class Ramp:
    """A piece that goes from one value to another, between the end of the piece before and its own.

    Attributes:
        start: Value where it begins.
        stop: Value where it ends.
        shape: `linear`, or `cosine` for half a cosine wave.
        until: Its end; its unit is the one in which the ramp advances.
    """

    start: float = field(converter=_float)
    stop: float = field(converter=_float)
    shape: Literal["linear", "cosine"]
    until: End

    def at(self, begin: int, now: "Progress") -> float:
        """Return the value at `now`, for a ramp that begins at `begin` in the unit of its end."""
        done = (self.until.position(now) - begin) / (self.until.at - begin)
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        low, high = sorted((self.start, self.stop))
        return min(max(low, self.start + (self.stop - self.start) * done), high)  # rounding may lead past an end


Piece: TypeAlias = Constant | Ramp


@frozen
class Curve:
    """A value over a run: pieces in order, each holding until its end.

    Attributes:
        pieces: The pieces. Ends increase within a unit; the last piece is a constant without an end.
    """

    pieces: tuple[Piece, ...]

    def __attrs_post_init__(self) -> None:
        problems = list(_misplaced(self.pieces))
        if problems:
            raise CurveError(problems)

    @classmethod
    def constant(cls, value: float) -> "Curve":
        """Return the curve that is `value` everywhere."""
        return cls((Constant(value),))

    def __call__(self, now: "Progress") -> float:
        """Return the value at `now`."""
        begin = 0
        for piece in self.pieces:
            if piece.until is None or not piece.until.reached(now):
                return piece.at(begin, now) if isinstance(piece, Ramp) else piece.value
            begin = piece.until.at
        raise AssertionError("the last piece has no end")

    def settled(self, now: "Progress") -> bool:
        """Return whether the last piece holds at `now`, and its value from there on."""
        return all(piece.until is None or piece.until.reached(now) for piece in self.pieces)

    def stretched(self, factor: float) -> "Curve":
        """Return the curve of a run that is `factor` times as long: every end, in tokens or steps, moves with it.

        Raises:
            CurveError: Two ends fall together.
        """
        return Curve(tuple(_stretched(piece, factor) for piece in self.pieces))

    @classmethod
    def parse(cls, raw: object) -> "Curve":
        """Read a curve as a preset writes it: a number, or a list of pieces.

        Raises:
            CurveError: With everything that is wrong.
        """
        if not isinstance(raw, list):
            problem = _number_problem(raw, "a number or a list of pieces")
            if problem:
                raise CurveError([((), problem)])
            return cls.constant(cast(float, raw))
        if not raw:
            raise CurveError([((), "expected a number or a list of pieces, got an empty list")])
        problems = [((i, *path), text) for i, piece in enumerate(raw) for path, text in _malformed(piece)]
        if problems:
            raise CurveError(problems)
        return cls(tuple(_piece(piece) for piece in raw))

    def dump(self) -> float | list[dict[str, float | int | str]]:
        """Return what `parse` reads back: a number for a constant curve, else a list of maps."""
        first = self.pieces[0]
        if len(self.pieces) == 1 and isinstance(first, Constant):
            return first.value
        return [_dump_piece(piece) for piece in self.pieces]


def _stretched(piece: Piece, factor: float) -> Piece:
    if piece.until is None:
        return piece
    until = End(max(1, round(piece.until.at * factor)), piece.until.unit)
    return evolve(piece, until=until)


def _dump_piece(piece: Piece) -> dict[str, float | int | str]:
    row: dict[str, float | int | str] = {}
    if piece.until is not None:
        row["until" if piece.until.unit == "tokens" else "until_step"] = piece.until.at
    if isinstance(piece, Constant):
        return row | {"value": piece.value}
    return row | {"from": piece.start, "to": piece.stop, "shape": piece.shape}


def _piece(raw: Mapping[str, float | str]) -> Piece:
    """Build a piece that `_malformed` found nothing wrong with."""
    until = None
    for key, unit in _UNITS.items():
        if key in raw:
            until = End(int(raw[key]), unit)
    if "value" in raw:
        return Constant(cast(float, raw["value"]), until)
    shape = cast(Literal["linear", "cosine"], raw["shape"])
    return Ramp(cast(float, raw["from"]), cast(float, raw["to"]), shape, cast(End, until))


def _malformed(raw: object) -> Iterator[Problem]:
    """Yield what is wrong with one raw piece by itself."""
    if not isinstance(raw, dict):
        yield (), f"expected a map such as {{until: 1e9, value: 0.1}}, got {raw!r}"
        return
    wanted = ("from", "to", "shape") if {"from", "to", "shape"} & raw.keys() else ("value",)
    for key in raw:
        if key not in (*_UNITS, *wanted):
            yield (
                (key,),
                f"unexpected here; a piece is `value`, or `from`, `to`, `shape`, with {' or '.join(_UNITS)}",
            )
    for key in wanted:
        if key not in raw:
            yield (), f"missing `{key}`"
        elif key == "shape":
            if raw[key] not in _SHAPES:
                yield (key,), f"must be one of {', '.join(_SHAPES)}, got {raw[key]!r}"
        elif problem := _number_problem(raw[key], "a number"):
            yield (key,), problem
    ends = [key for key in _UNITS if key in raw]
    if len(ends) > 1:
        yield (), "ends twice: keep one of until and until_step"
    if not ends and "from" in wanted:
        yield (), "a ramp needs an end: until or until_step"
    for key in ends:
        problem = _number_problem(raw[key], "a whole number")
        if problem or not (float(raw[key]).is_integer() and 0 < raw[key] < 2**63):  # as large as a preset can write
            yield (key,), problem or f"must be a whole number > 0 and < 2**63, got {raw[key]!r}"


def _misplaced(pieces: Sequence[Piece]) -> Iterator[Problem]:
    """Yield what is wrong with the order of the pieces."""
    if not pieces:
        yield (), "a curve needs a piece"
        return
    ends: dict[str, int] = {"tokens": 0, "steps": 0}
    before: End | None = None
    for i, piece in enumerate(pieces):
        end, last = piece.until, i == len(pieces) - 1
        if isinstance(piece, Ramp) and before is not None and piece.until.unit != before.unit:
            text = "the ramp advances in {}, but the piece before ends at {} {}, so where it begins is not known"
            yield (i,), text.format(piece.until.unit, before.at, before.unit) + "; end both in the same unit"
        if last and isinstance(piece, Ramp):
            yield (i,), "the last piece cannot be a ramp; add {value: ...} to say what follows"
        elif last and end is not None:
            yield (i,), "the last piece must not end; leave out until and until_step"
        elif not last and end is None:
            yield (i,), "only the last piece may leave out until and until_step"
        if end is not None:
            if end.at <= ends[end.unit]:
                yield (i,), f"ends at {end.at} {end.unit}, which must be more than {ends[end.unit]}"
            ends[end.unit] = end.at
        before = end


def _number_problem(raw: object, wanted: str) -> str | None:
    """Return why `raw` is not a finite number, or None."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return f"expected {wanted}, got {raw!r}"
    try:
        finite = math.isfinite(float(raw))
    except OverflowError:
        finite = False
    return None if finite else f"must be finite, got {raw!r}"
