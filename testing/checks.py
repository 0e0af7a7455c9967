"""The conformance kit without pytest: every law of a component's slot, tried and told."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import torch
from attrs import frozen

from tangram.core.config import suggest
from tangram.core.plugins import PluginError, Plugins
from tangram.core.registry import Entry
from tangram.testing import laws
from tangram.testing.contracts import CONTRACTS
from tangram.testing.laws import Contract, Finding, Status
from tangram.testing.ranks import prepare_ranks


@frozen
class Report:
    """What became of every law of a component.

    Attributes:
        component: Slot and name, such as `attention.mla`.
        origin: Who ships it.
        findings: One for each law.
    """

    component: str
    origin: str
    findings: tuple[Finding, ...]

    @property
    def conforms(self) -> bool:
        """Whether no law fails."""
        return not any(finding.bad for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values."""
        rows = [
            {
                "law": finding.law,
                "sentence": finding.sentence,
                "result": finding.status.value,
                "seconds": round(finding.seconds, 3),
                "why": finding.why,
                "example": finding.example,
                "blob": finding.blob,
            }
            for finding in self.findings
        ]
        return {"component": self.component, "origin": self.origin, "conforms": self.conforms, "laws": rows}


def run_checks(
    component: str,
    *,
    config: object = None,
    profile: str = "full",
    device: str = "cpu",
    dtype: str = "float64",
    expected_failures: Mapping[str, str] | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Try every law of a component's slot on it.

    Args:
        component: Slot and name, such as `attention.mla`.
        config: The config to try; by default what its class's `example(folder)` returns, which puts files that it
            needs into the folder, or else small valid ones that are drawn.
        profile: `ci` or `full`: how many examples of each law.
        device: Where tensors are.
        dtype: Dtype of the products: `float64`, `float32` or `bfloat16`.
        expected_failures: Reasons by law; one that holds nevertheless is a failure.
        plugins: What exists; by default what is installed.

    Raises:
        ValueError: There is no such component, profile, dtype or device, or its slot has no laws.
        PluginError: It may be in a plugin that is broken.
    """
    known = plugins or Plugins.discover()
    entry = _entry(component, known)
    if profile not in laws.EXAMPLES:
        raise ValueError(f"there is no profile '{profile}'{suggest(profile, laws.EXAMPLES)}")
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"there is no floating dtype '{dtype}'")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ValueError(f"there is no device '{device}' here to compute on: {error}") from error
    # What components print is no part of the result.
    with TemporaryDirectory(prefix="tangram-") as folder, redirect_stdout(StringIO()):
        if config is None and hasattr(entry.config, "example"):
            config = entry.config.example(Path(folder))
        contract = _contract(entry, config, profile, device, wanted, expected_failures or {})
        if "ranks" in contract.capabilities():
            prepare_ranks()  # while laws that do without them are tried
        findings = tuple(laws.examine(contract, law) for law in contract.laws())
    return Report(component, entry.origin, findings)


def _contract(
    entry: Entry, config: object, profile: str, device: str, dtype: torch.dtype, expected: Mapping[str, str]
) -> type[Contract]:
    base = CONTRACTS.get(entry.mark.slot)
    if base is None:
        raise ValueError(f"the slot {entry.mark.slot} has no laws")
    members: dict[str, Any] = {
        "config": entry.config if config is None else config,
        "profile": profile,
        "device": device,
        "dtype": dtype,
        "expected_failures": expected,
    }
    return type(entry.config.__name__, (base,), members)


def _entry(component: str, plugins: Plugins) -> Entry:
    slot, _, use = component.partition(".")
    entry = plugins.registry.get(slot, use)
    if entry is None:
        everything = [_name(each) for each in plugins.registry]
        message = f"there is no component '{component}'{suggest(component, everything)}"
        raise PluginError(f"{message}\n{plugins.report()}") if plugins.broken else ValueError(message)
    return entry


def _name(entry: Entry) -> str:
    return f"{entry.mark.slot}.{entry.mark.use}"


def components_of(name: str, plugins: Plugins) -> list[str]:
    """Return the components that a name stands for: one, all of a distribution or file, or all of a slot.

    Raises:
        ValueError: It stands for none.
        PluginError: It may stand for a plugin that is broken.
    """
    wanted = name.lower().replace("_", "-")
    found = []
    for entry in plugins.registry:
        shipped_by = {entry.origin, entry.origin.partition(" ")[0], Path(entry.origin).stem}
        known = {_name(entry), entry.mark.slot, *shipped_by}
        if wanted in {each.lower().replace("_", "-") for each in known}:
            found.append(_name(entry))
    if not found:
        _entry(name, plugins)
    return found


def as_junit(reports: Sequence[Report]) -> str:
    """Return reports as JUnit XML, one suite a component."""
    suites = ElementTree.Element("testsuites")
    for report in reports:
        bad = [finding for finding in report.findings if finding.bad]
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=report.component,
            tests=str(len(report.findings)),
            failures=str(len(bad)),
            skipped=str(sum(finding.status is Status.NOT_APPLICABLE for finding in report.findings)),
            time=f"{sum(finding.seconds for finding in report.findings):.3f}",
        )
        for finding in report.findings:
            case = ElementTree.SubElement(
                suite, "testcase", classname=report.component, name=finding.law, time=f"{finding.seconds:.3f}"
            )
            if finding.bad:
                failure = ElementTree.SubElement(case, "failure", message=finding.why)
                failure.text = f"{finding.sentence}\n{finding.example}\n{finding.blob}"
            elif finding.status is not Status.HOLDS:
                ElementTree.SubElement(case, "skipped", message=finding.why or finding.status.value)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
