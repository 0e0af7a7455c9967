"""The study file: what is varied, what is held equal, what is measured; and the variants that it comes to."""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from attrs import define, evolve, field, frozen
from attrs.validators import matches_re, min_len

from tangram.core.config import DEFAULT, ConfigError, Node, Origin, Plain, Problem, Scalar, describe, load
from tangram.core.context import BuildError
from tangram.core.contracts import LauncherConfig
from tangram.core.experiment import Experiment
from tangram.core.plugins import Plugins
from tangram.core.presets import Resolved, difference, resolve
from tangram.core.structuring import structure

_T = TypeVar("_T")

BASE = "base"
"""What the variant without a patch is called."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What a study and an entry of an axis may be called: names of files, and words of a table."""

_GROUP = re.compile(r"model\.blocks\.\d+\.")

Better: TypeAlias = Literal["lower", "higher"]


@frozen(kw_only=True)
class MatchConfig:
    """What every variant has in common with the base.

    Attributes:
        on: `tokens`: all train on as many. `flops`: for as many training operations. `time`: for as long.
            `parameters`: on as many tokens, with as many parameters in the main model.
        by: With `parameters`, the dotted path of the whole number that is solved for in every variant.
    """

    on: Literal["tokens", "flops", "time", "parameters"] = "tokens"
    by: str = ""

    def __attrs_post_init__(self) -> None:
        if (self.on == "parameters") != bool(self.by):
            raise ValueError("`by` names the field to solve for where `on` is parameters, and nothing elsewhere")


@frozen(kw_only=True)
class StudyFile:
    """A study as it is written, but for its patches.

    Attributes:
        name: Names its directory.
        base: The preset that is varied: a name, or a path relative to the study file.
        seeds: Values of `train.seed`, the same for every variant; a number N stands for 0 to N - 1.
        design: `each` makes one variant of each entry of each axis; `product` of each way to take at most one entry
            of every axis.
        match: What every variant has in common with the base; `tokens` where it is not said.
        metrics: What is compared, and whether lower or higher is better. `eval.NAME` is the evaluation at the end on
            all held-out text; any other column of metrics.jsonl is averaged over the last tenth of the steps.
        launcher: What runs the cells; `local` where it is not said.
        keep_checkpoints: Whether a finished cell keeps its last checkpoints, which are large.
    """

    name: str = field(validator=matches_re(_NAME))
    base: str = field(validator=min_len(1))
    seeds: tuple[int, ...] = field(validator=min_len(1))
    design: Literal["each", "product"] = "each"
    match: MatchConfig = MatchConfig()
    metrics: Mapping[str, Better] = field(validator=min_len(1))
    launcher: LauncherConfig
    keep_checkpoints: bool = False


@define(eq=False)
class Variant:
    """The base, or a patch on it.

    Attributes:
        name: Its entries, joined by a plus.
        patches: What is laid over the base preset, in order.
        resolved: What it resolves to.
    """

    name: str
    patches: tuple[Node, ...]
    resolved: Resolved

    @property
    def experiment(self) -> Experiment:
        """What is trained, but for the seed."""
        return self.resolved.experiment

    def building(self, build: Callable[[], _T]) -> _T:
        """Call `build`, which builds something of this variant.

        Raises:
            ConfigError: A component refuses its surroundings; with the line where it was written.
        """
        try:
            return build()
        except BuildError as error:
            origin = self.resolved.blame(error.path, error.message)
            raise ConfigError([_in(self.name, Problem(origin, error.path, error.message))]) from error

    def seeded(self, seed: int) -> Experiment:
        """Return the experiment of one cell."""
        return evolve(self.experiment, train=evolve(self.experiment.train, seed=seed))


@frozen(eq=False)
class Study:
    """A study, expanded.

    Attributes:
        file: Where it is written.
        asked: What is written there.
        variants: The base, and what is compared with it.
        plugins: What exists.
    """

    file: Path
    asked: StudyFile
    variants: tuple[Variant, ...]
    plugins: Plugins

    @property
    def base(self) -> Variant:
        """The variant without a patch of its own."""
        return self.variants[0]

    def with_patch(self, variant: Variant, patch: Node) -> Variant:
        """Return a variant with one more patch.

        Raises:
            ConfigError: It does not resolve.
        """
        return _variant(variant.name, (*variant.patches, patch), self.asked, self.file, self.plugins)

    def differences(self) -> dict[str, dict[str, tuple[Scalar, Scalar]]]:
        """Return for every variant but the base the leaves that differ, as they are in the base and in it.

        What a group of blocks has from `model.block` is said there alone.
        """
        found = {}
        for variant in self.variants[1:]:
            changes = difference(self.base.experiment, variant.experiment)
            found[variant.name] = {
                path: pair
                for path, pair in changes.items()
                if pair[0] != pair[1]  # a null is as good as a key that is not there
                and not ((group := _GROUP.match(path)) and changes.get(f"model.block.{path[group.end() :]}") == pair)
            }
        return found

    def refuse_equals(self) -> None:
        """Check that no two variants are one.

        Raises:
            ConfigError: Two are.
        """
        problems = []
        for i, variant in enumerate(self.variants):
            for other in self.variants[:i]:
                if other.experiment == variant.experiment:
                    origin = variant.patches[-1].origin if variant.patches else Origin(str(self.file))
                    text = f"the variants '{other.name}' and '{variant.name}' resolve to the same experiment"
                    problems.append(Problem(origin, "axes", f"{text}; drop one, or change its patch"))
        if problems:
            raise ConfigError(problems)


def read_study(file: Path, plugins: Plugins) -> Study:
    """Read a study file and resolve its variants; nothing is matched yet.

    Raises:
        ConfigError: With every problem and its line.
        PluginError: A plugin that it needs is broken.
    """
    tree = load(file)
    assert isinstance(tree.value, dict)
    entries = dict(tree.value)
    patch, axes = entries.pop("patch", Node({}, tree.origin)), entries.pop("axes", None)
    problems = list(_misshapen(patch, axes, tree.origin))
    try:
        asked = structure(_normal(Node(entries, tree.origin)), StudyFile, plugins.registry)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    problems += _doubled(asked, tree)
    if problems or axes is None:
        raise ConfigError(problems)
    shared = () if patch.value == {} else (patch,)
    variants: list[Variant] = []
    for name, patches in [(BASE, ()), *_expanded(axes, asked.design)]:
        variants.append(_variant(name, (*shared, *patches), asked, file, plugins))
    study = Study(file, asked, tuple(variants), plugins)
    study.refuse_equals()
    return study


def _variant(name: str, patches: tuple[Node, ...], asked: StudyFile, file: Path, plugins: Plugins) -> Variant:
    try:
        found = resolve(asked.base, (), plugins, patches=patches, folder=file.parent)
    except ConfigError as error:
        raise ConfigError(_in(name, problem) for problem in error.problems) from None
    return Variant(name, patches, found)


def _in(variant: str, problem: Problem) -> Problem:
    return evolve(problem, text=f"{problem.text} (in variant '{variant}')")


def _normal(tree: Node) -> Node:
    """Write out what a study file may say in short."""
    assert isinstance(tree.value, dict)
    entries = {"launcher": Node.of({"use": "local"}, DEFAULT)} | tree.value
    seeds, match = entries.get("seeds"), entries.get("match")
    if seeds is not None and isinstance(seeds.value, int) and not isinstance(seeds.value, bool):
        listed: list[Plain] = list(range(min(seeds.value, 10_000)))
        entries["seeds"] = Node.of(listed, seeds.origin)
    if match is not None and isinstance(match.value, str):
        entries["match"] = Node.of({"on": match.value}, match.origin)
    return Node(entries, tree.origin)


def _misshapen(patch: Node, axes: Node | None, origin: Origin) -> Iterator[Problem]:
    """Yield what is wrong with the shape of the patches; what is in them is for the presets to say."""
    if not isinstance(patch.value, dict):
        yield Problem(patch.origin, "patch", f"expected a map, got {describe(patch.plain())}")
    if axes is None:
        yield Problem(origin, "axes", "is missing: name what is varied, such as axes: {attention: {gqa: {model: ...}}}")
        return
    seen: dict[str, Origin] = {}
    named = {"axes": axes} | {f"axes.{name}": axis for name, axis in _items(axes)}
    for path, axis in named.items():
        if not isinstance(axis.value, dict) or not axis.value:
            yield Problem(axis.origin, path, f"expected a map, got {describe(axis.plain())}")
    for axis_name, axis in _items(axes):
        for name, entry in _items(axis):
            path = f"axes.{axis_name}.{name}"
            if not isinstance(entry.value, dict):
                yield Problem(entry.origin, path, f"expected a patch, which is a map, got {describe(entry.plain())}")
            elif _seed(entry) is not None:
                yield Problem(entry.origin, path, "sets train.seed, which `seeds` does")
            if not _NAME.fullmatch(name) or name == BASE:
                yield Problem(entry.origin, path, f"'{name}' cannot be the name of a variant: letters, digits, _ . -")
            elif name in seen:
                yield Problem(entry.origin, path, f"there is an entry '{name}' at {seen[name]} already")
            seen[name] = entry.origin
    if _seed(patch) is not None:
        yield Problem(patch.origin, "patch", "sets train.seed, which `seeds` does")


def _seed(patch: Node) -> Node | None:
    train = patch.child("train")
    return train.child("seed") if train else None


def _items(node: Node) -> list[tuple[str, Node]]:
    return list(node.value.items()) if isinstance(node.value, dict) else []


def _doubled(asked: StudyFile, tree: Node) -> Iterator[Problem]:
    for key, values in {"seeds": asked.seeds}.items():
        if len(set(values)) < len(values):
            at = tree.child(key)
            yield Problem(at.origin if at else None, key, "one stands there twice")


def _expanded(axes: Node, design: Literal["each", "product"]) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """Yield the name and the patches of every variant but the base."""
    listed = [_items(axis) for _, axis in _items(axes)]
    if design == "each":
        yield from ((name, (entry,)) for axis in listed for name, entry in axis)
        return
    for taken in product(*([None, *axis] for axis in listed)):
        chosen = [entry for entry in taken if entry is not None]
        if chosen:
            yield "+".join(name for name, _ in chosen), tuple(entry for _, entry in chosen)
