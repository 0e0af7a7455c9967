"""What the command `check-plugin` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tangram.core.files import write_whole
from tangram.core.plugins import Plugins
from tangram.core.terminal import FAILED, OK, as_json, refuse, say, table
from tangram.testing.checks import Report, as_junit, components_of, run_checks
from tangram.testing.laws import Status


def check_plugin(
    name: str,
    profile: Literal["ci", "full"],
    device: str,
    dtype: Literal["float64", "float32", "bfloat16"],
    as_text: bool,
    junit: Path | None,
    files: Sequence[Path],
) -> int:
    """Try every law that components of a slot owe, and print what became of each; return the exit code."""
    plugins = Plugins.discover(files)
    try:
        names = components_of(name, plugins)
        reports = []
        for component in names:
            report = run_checks(component, profile=profile, device=device, dtype=dtype, plugins=plugins)
            reports.append(report)
            if as_text:
                _print(report)
    except ValueError as error:
        return refuse(str(error))
    if junit is not None:
        write_whole(junit, as_junit(reports))
    if not as_text:
        as_json({"components": [report.as_dict() for report in reports]})
    return OK if all(report.conforms for report in reports) else FAILED


def _print(report: Report) -> None:
    say(f"{report.component} ({report.origin})")
    rows = [(found.law, found.status.value, f"{found.seconds:.2f} s") for found in report.findings]
    table(("law", "result", "time"), rows)
    for found in report.findings:
        if found.status in (Status.FAILS, Status.WARNS):
            say(f"\n{found.law} {found.status.value}: {found.sentence}")
            say("\n".join(f"  {line}" for line in (found.why, found.example, found.blob) if line))
    bad = sum(found.bad for found in report.findings)
    whole = sum(found.seconds for found in report.findings)
    say(f"{'conforms' if report.conforms else f'{bad} laws fail'}; {len(report.findings)} laws in {whole:.1f} s\n")
