"""Whatever is written in a preset: it resolves, or every problem is told with its file and line, within two seconds."""

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import answers

from tangram.core.config import ConfigError, Problem, show_path
from tangram.core.plugins import Plugins
from tangram.core.presets import available, resolve

SLOWEST = 2.0
"""Seconds that one preset may take."""

Dice = random.Random
Mutation = Callable[[Dice, bytes], bytes]

PLUGINS = Plugins.discover()
PRESETS = {name: path.read_bytes() for name, path in available(PLUGINS).items()}
SCALAR = re.compile(rb"(?<=: )[^\s,{}\[\]#]+")
KEY = re.compile(rb"(?<![a-z_])[a-z_]++(?=:)")  # possessive, for there are megabytes of one letter among the mutants
TOKEN = re.compile(rb"\w+|[^\w\s]|\s+")

ODD = r"""
null ~ true no '' "3" 'x' [] {} [1] {"a":1} [[]] [null] 0 -1 1 2.7 -0.0 3e-400 1e308 1e999 .nan -.inf 0x10 0o17 010
1_000 12:30:45 2024-01-01 9223372036854775807 -9223372036854775809 99999999999999999999999999 !!int !!python/object:os.x
&a *a <<: ? | > - : @x `x` %x "\ud800" "\x00" ../../../etc/passwd v3-tiny mla synthetic next_token
"""
TYPES = re.findall(r"\S+", ODD)
STRANGE = ("\x00", "\x07", "\x85", "\u2028", "\u202e", "\ufeff", "\U0001f9e9", "é", "١", "\t", "\r", "\x1b[31m")


def flip_a_bit(dice: Dice, text: bytes) -> bytes:
    at = dice.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << dice.randrange(8)]) + text[at + 1 :]


def swap_tokens(dice: Dice, text: bytes) -> bytes:
    tokens = TOKEN.findall(text)
    one, other = dice.randrange(len(tokens)), dice.randrange(len(tokens))
    tokens[one], tokens[other] = tokens[other], tokens[one]
    return b"".join(tokens)


def shuffle_lines(dice: Dice, text: bytes) -> bytes:
    """Delete a line, write it twice, move it, or bring one of another preset."""
    lines = text.splitlines(keepends=True)
    at, to = dice.randrange(len(lines)), dice.randrange(len(lines))
    line, how = lines[at], dice.randrange(4)
    if how in (0, 2):
        del lines[at]
    if how in (1, 2):
        lines.insert(to, line)
    if how == 3:
        lines.insert(to, dice.choice(dice.choice(list(PRESETS.values())).splitlines(keepends=True)))
    return b"".join(lines)


def cut_short(dice: Dice, text: bytes) -> bytes:
    return text[: dice.randrange(len(text))]


def at_one_of(pattern: re.Pattern[bytes], dice: Dice, text: bytes, value: Callable[[bytes], bytes]) -> bytes:
    """Replace one match of `pattern`."""
    found = list(pattern.finditer(text))
    if not found:
        return text
    match = dice.choice(found)
    return text[: match.start()] + value(match.group()) + text[match.end() :]


def change_a_type(dice: Dice, text: bytes) -> bytes:
    return at_one_of(SCALAR, dice, text, lambda _: dice.choice(TYPES).encode())


def change_a_number(dice: Dice, text: bytes) -> bytes:
    number = dice.choice((-1, 1)) * round(10 ** dice.uniform(-3, 22), dice.choice((0, 3)))
    return at_one_of(re.compile(rb"\b[0-9.e]+\b"), dice, text, lambda _: f"{number:.{dice.choice((3, 25))}g}".encode())


def nest(dice: Dice, text: bytes) -> bytes:
    depth, (opened, closed) = dice.choice((5, 49, 51, 5000)), dice.choice((("[", "]"), ("{a: ", "}"), ("- ", "")))
    return at_one_of(SCALAR, dice, text, lambda old: opened.encode() * depth + old + closed.encode() * depth)


def misspell_a_key(dice: Dice, text: bytes) -> bytes:
    return at_one_of(KEY, dice, text, lambda key: key.replace(key[:1], dice.choice((b"", b"z", key[:1] * 2)), 1))


def add_a_key(dice: Dice, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    key = dice.choice(("extra", "use", "model", "plugins", "extends", "9", "null", "é", "a b", "a.b", "__class__"))
    lines.insert(dice.randrange(len(lines)), f"{'  ' * dice.randrange(4)}{key}: {dice.choice(TYPES)}\n".encode())
    return b"".join(lines)


def add_a_character(dice: Dice, text: bytes) -> bytes:
    at = dice.randrange(len(text))
    return text[:at] + dice.choice(STRANGE).encode() + text[at:]


def indent_otherwise(dice: Dice, text: bytes) -> bytes:
    return at_one_of(re.compile(rb"(?m)^ +"), dice, text, lambda _: dice.choice((b"", b" ", b"\t", b"     ")))


def swell(dice: Dice, text: bytes) -> bytes:
    """Put in something as large as a file may be, or larger."""
    size = int(10 ** dice.uniform(3, 6.1))
    big = dice.choice(
        (
            "[" + "1," * (size // 2) + "1]",
            "[" + "{}," * (size // 3) + "1]",
            "{" + ", ".join(f"k{i}: {i}" for i in range(size // 16)) + "}",
            "x" * size,
            "'" + "\\" * size + "'",
            "9" * size,
            "\n" + "  - 1\n" * (size // 6),
        )
    )
    return at_one_of(SCALAR, dice, text, lambda _: big.encode())


MUTATIONS: dict[Mutation, int] = {
    flip_a_bit: 8,
    swap_tokens: 8,
    shuffle_lines: 8,
    change_a_type: 8,
    change_a_number: 8,
    misspell_a_key: 8,
    add_a_key: 8,
    add_a_character: 4,
    indent_otherwise: 4,
    cut_short: 4,
    nest: 3,
    swell: 1,
}
"""With what weight each is drawn."""


def mutant(seed: int) -> bytes:
    """Return preset number `seed`: one that ships, after one to three mutations."""
    dice = random.Random(seed)
    text = dice.choice(list(PRESETS.values()))
    for mutation in dice.choices(list(MUTATIONS), list(MUTATIONS.values()), k=dice.randint(1, 3)):
        text = mutation(dice, text) or b"\n"
    return text


IN_CI, IN_ALL, CHUNK = 400, 10_000, 200
PROCESSES_IN_CI, PROCESSES_IN_ALL = 6, 200


def placed(problem: Problem, files: set[str]) -> bool:
    """Whether a problem names one of `files` and a line of it; a file that is too large was never read."""
    at = problem.origin
    return at is not None and at.file in files and (at.line is not None or problem.text.startswith("is larger than"))


def resolves_or_tells(seeds: range, tmp_path: Path) -> None:
    """Check that each mutant is built without weights, or told what is wrong and where, in time."""
    path = tmp_path / "mutant.yaml"
    files = {show_path(Path(file)) for file in (path, *available(PLUGINS).values())}
    faults = []
    for seed in seeds:
        path.write_bytes(mutant(seed))
        began = time.process_time()
        try:
            resolve(path, (), PLUGINS)
        except ConfigError as error:
            faults += [f"{seed}: no place: {p}" for p in error.problems if not placed(p, files)]
            if not error.problems:
                faults.append(f"{seed}: no problem told")
        except Exception as error:
            faults.append(f"{seed}: {error!r}")
        if (took := time.process_time() - began) > SLOWEST:
            faults.append(f"{seed}: took {took:.1f} s")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("first", range(0, IN_CI, CHUNK))
def test_a_mutated_preset_resolves_or_is_told_what_is_wrong_and_where(first: int, tmp_path: Path) -> None:
    resolves_or_tells(range(first, first + CHUNK), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, IN_ALL, CHUNK))
def test_ten_thousand_mutated_presets_resolve_or_are_told_what_is_wrong_and_where(first: int, tmp_path: Path) -> None:
    resolves_or_tells(range(first, first + CHUNK), tmp_path)


def test_the_mutants_reach_every_stage_of_reading(tmp_path: Path) -> None:
    """Else the test above would be about parsers only."""
    told = [text for seed in range(150) for text in told_of(mutant(seed), tmp_path / "mutant.yaml") or ["resolved"]]
    for stage in ("resolved", "not parseable", "deeper", "unknown key", "is missing", "expected", "must be"):
        assert any(stage in text for text in told), stage


def told_of(text: bytes, path: Path) -> list[str]:
    """Return the problems of a preset; none if it resolves."""
    path.write_bytes(text)
    try:
        resolve(path, (), PLUGINS)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


LARGE = {
    "a flow list": "extends: [" + "1," * 100_000 + "1]",
    "a list of lines": "extends:\n" + "- v3-tiny\n" * 20_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "one key many times": "name: x\n" * 25_000,
    "unknown keys": "extends: v3-tiny\n" + "".join(f"modl{i}: 1\n" for i in range(2_400)),
    "many blocks": "extends: v3-tiny\nmodel: {blocks: [" + "{repeat: 1}," * 1_500 + "]}",
    "many parents": "extends: [" + "v3-tiny," * 4_900 + "v3-tiny]",
    "a long word": "name: " + "x" * 240_000,
    "many words": "name: " + "x " * 120_000,
    "many lines": "name: >\n" + " x\n" * 80_000,
    "a long number": "name: " + "9" * 240_000,
    "empty lines": "\n" * 240_000,
    "brackets": "name: " + "[" * 240_000,
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_preset_as_large_as_may_be_is_answered_in_time(kind: str, tmp_path: Path) -> None:
    began = time.process_time()
    told = told_of(LARGE[kind].encode(), tmp_path / "large.yaml")
    assert time.process_time() - began < SLOWEST
    assert all(text.startswith(str(tmp_path / "large.yaml")) for text in told)


def exits_with_0_or_2(seeds: range, tmp_path: Path) -> None:
    """Check that `tangram check` answers each mutant without a traceback."""
    for seed in seeds:
        (tmp_path / f"{seed}.yaml").write_bytes(mutant(seed))
    commands = {f"{seed}": ["check", f"{seed}.yaml"] for seed in seeds}
    for seed, (code, said) in answers(commands, tmp_path, os.environ).items():
        assert code in (0, 2) and said and "Traceback" not in said, (seed, code, said)


def test_the_command_exits_with_0_or_2_and_never_with_a_traceback(tmp_path: Path) -> None:
    exits_with_0_or_2(range(PROCESSES_IN_CI), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, PROCESSES_IN_ALL, 20))
def test_two_hundred_commands_exit_with_0_or_2_and_never_with_a_traceback(first: int, tmp_path: Path) -> None:
    exits_with_0_or_2(range(first, first + 20), tmp_path)
