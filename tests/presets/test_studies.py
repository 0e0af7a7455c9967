"""The studies that are shipped: each can be run, ends in verdicts, and is matched as it says."""

from pathlib import Path

import pytest

from tangram.core.matching import MOST, matched
from tangram.core.plugins import Plugins
from tangram.core.statistics import FEWEST
from tangram.core.study import Variant, read_study

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
SHIPPED = ("attention", "balance", "fp8", "mtp", "pieces", "yarn")


def never(variant: Variant) -> None:
    raise AssertionError(f"{variant.name}: what a shipped study trains on may not depend on the machine")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_is_matched_and_has_seeds_enough(name: str) -> None:
    study = read_study(STUDIES / f"{name}.yaml", Plugins.discover())
    assert study.asked.name == name
    assert len(study.asked.seeds) >= FEWEST
    found = matched(study, never)
    assert found.residuals.keys() == {variant.name for variant in study.variants[1:]}
    assert all(abs(residual) <= MOST for residual in found.residuals.values())


def test_every_study_is_named_here_and_in_its_page() -> None:
    files = {path.stem for path in STUDIES.glob("*.yaml")} - {"small"}
    page = STUDIES.parent.joinpath("studies.md").read_text(encoding="utf-8")
    assert files == set(SHIPPED)
    assert all(f"(studies/{name}.yaml)" in page for name in files)
