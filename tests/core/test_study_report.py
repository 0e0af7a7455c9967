"""The report of a study: told from its directory alone, one table in three writings, and nothing left out."""

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import attrs
import pytest

from tangram.core.cells import Cell, write_cell
from tangram.core.files import write_whole
from tangram.core.markup import POLICY
from tangram.core.reports import ReportError, Trace
from tangram.core.study_figures import AXES, curves, forest, stretched
from tangram.core.study_record import PLAN, StudyPlan, StudyRecord, VariantPlan, read_study_record
from tangram.core.study_report import latex, markdown, page, results, table_of_cells, write_study_report
from tangram.core.study_tables import tables

SEEDS = (0, 1, 2, 3)
HOSTILE = "</title><script>alert(1)</script>& _a|b $\\frac{1}% #^~"
STEPS = 30
BITS, VIOLATION = "eval.bits_per_byte", "violation"

Loss = Callable[[int, int], float]
"""A column of a run by seed and step."""


def variant(name: str, **changes: object) -> VariantPlan:
    cells = {seed: f"{name}-{seed}" for seed in SEEDS}
    difference = {} if name == "base" else {f"model.{name}": (1, 2)}
    plan = VariantPlan(name, difference, 1000, 500, 3000, 9000, None if name == "base" else 0.01, cells)
    return attrs.evolve(plan, **changes)


def study(folder: Path, bits: dict[str, Loss], **changes: object) -> Path:
    """Write the directory of a finished study by hand."""
    plan = StudyPlan(
        name="hand-made",
        base="v3-tiny",
        seeds=SEEDS,
        match="tokens",
        statement="Equal tokens.",
        metrics={BITS: "lower", VIOLATION: "lower"},
        command=("tangram", "ablate", "a study.yaml"),
        versions={"torch": "2.13"},
        variants=tuple(variant(name) for name in bits),
    )
    plan = attrs.evolve(plan, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN, json.dumps(attrs.asdict(plan)))
    for entry in plan.variants:
        for seed in plan.seeds:
            run(
                folder / "cells" / entry.cells[seed],
                Cell(entry.cells[seed], entry.name, seed, "done"),
                bits[entry.name],
            )
    return folder


def run(directory: Path, cell: Cell, bits: Loss) -> None:
    directory.mkdir(parents=True)
    (directory / "experiment.yaml").write_text("name: x\n")
    rows: list[dict[str, object]] = []
    for step in range(1, STEPS + 1):
        tokens = 100 * step
        rows.append(
            {"step": step, "tokens": tokens, "seconds": 0.1 * step, "loss.next_token": 5 / step, VIOLATION: 1 / step}
        )
        if step % 10 == 0:
            rows.append({"step": step, "tokens": tokens, BITS: bits(cell.seed, step), "eval.complete": step == STEPS})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "verdict.json").write_text(json.dumps({"peak_rss": 2**20 * (100 + cell.seed)}))
    write_cell(directory, cell)


def of_seed(level: float, jitter: float = 0.001) -> Loss:
    """A loss that shares what its seed does with the other variants, and has a little of its own."""
    return lambda seed, step: level + 0.1 * seed + jitter * (-1) ** seed * (1 + seed) + 1 / step


@pytest.fixture
def made(tmp_path: Path) -> StudyRecord:
    return read_study_record(study(tmp_path, {"base": of_seed(2.0, 0), "good": of_seed(1.9), "same": of_seed(2.0001)}))


def rows_of(record: StudyRecord, title: str) -> dict[str, tuple[str, ...]]:
    (table,) = [table for table in tables(record) if table.title == title]
    return {row[0]: row for row in table.rows}


def test_the_verdicts_are_those_of_the_final_evaluations(made: StudyRecord) -> None:
    base, good, same = made.compare(BITS)
    assert base.values == {seed: 2.0 + 0.1 * seed + 1 / STEPS for seed in SEEDS}
    assert (good.finding.value, same.finding.value) == ("better", "within noise")
    assert good.difference is not None
    assert good.difference.mean == pytest.approx(-0.1 + 0.001 * (1 - 2 + 3 - 4) / 4)
    shown = rows_of(made, f"Verdict: {BITS}")["good"]
    assert shown[2] == "-0.1005"
    assert shown[5:] == ("4", "1.00", "better")


def test_the_p_values_are_those_of_holm(made: StudyRecord) -> None:
    _, good, same = made.compare(BITS)
    raw = [row.difference.p for row in (good, same) if row.difference is not None]
    assert good.p == pytest.approx(2 * min(raw))  # type: ignore[type-var,operator]
    assert same.p == pytest.approx(max(2 * min(raw), max(raw)))  # type: ignore[type-var,operator]


def test_two_seeds_get_no_verdict(tmp_path: Path) -> None:
    record = read_study_record(study(tmp_path, {"base": of_seed(2), "good": of_seed(1)}, seeds=(0, 1)))
    assert rows_of(record, f"Verdict: {BITS}")["good"][-1] == "no verdict"


def test_one_table_in_three_writings(made: StudyRecord) -> None:
    texts = {"markdown": markdown(made), "latex": latex(made), "html": page(made)}
    for table in tables(made):
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in texts["markdown"]
            assert (
                " & ".join(cell.replace("_", r"\_").replace("%", r"\%").replace("–", "--") for cell in row)
                in texts["latex"]
            )
            words = Words(texts["html"]).rows
            assert list(row) in words
    assert texts["latex"].count(r"\toprule") == sum(bool(table.rows) for table in tables(made))


class Words(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.policy = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.cell = self.cell or tag == "td"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if dict(attributes).get("http-equiv"):
            self.policy = dict(attributes)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_bad_cells_are_listed_with_their_reason_and_are_in_no_number(tmp_path: Path) -> None:
    folder = study(tmp_path, {"base": of_seed(2.0, 0), "good": of_seed(1.9)})
    plan = read_study_record(folder).plan.variants[1]
    for seed, state in ((0, "failed"), (1, "diverged"), (2, "running")):
        write_cell(
            folder / "cells" / plan.cells[seed], Cell(plan.cells[seed], "good", seed, state, f"because of {seed}")
        )  # type: ignore[arg-type]
    record = read_study_record(folder)
    (trouble,) = [table for table in tables(record) if table.title.startswith("Failed")]
    assert [row[:4] for row in trouble.rows] == [
        ("good", "0", "failed", "because of 0"),
        ("good", "1", "diverged", "because of 1"),
        ("good", "2", "running", "because of 2"),
    ]
    assert list(record.compare(BITS)[1].values) == [3]
    assert rows_of(record, f"Verdict: {BITS}")["good"][-1] == "no verdict"


def test_a_cell_that_never_began_is_pending(tmp_path: Path) -> None:
    folder = study(tmp_path, {"base": of_seed(2.0), "good": of_seed(1.9)})
    lost = folder / "cells" / read_study_record(folder).plan.variants[1].cells[0]
    for path in lost.iterdir():
        path.unlink()
    assert [(bad.cell.variant, bad.cell.seed, bad.cell.state) for bad in read_study_record(folder).bad] == [
        ("good", 0, "pending")
    ]


def test_the_matching_is_stated_with_its_residual(made: StudyRecord) -> None:
    (table,) = [table for table in tables(made) if table.title.startswith("What was held equal")]
    assert table.caption.startswith("Equal tokens.")
    assert [row[table.header.index("residual")] for row in table.rows] == ["–", "+1.00%", "+1.00%"]
    assert [row[-2:] for row in table.rows] == [("3.0", "102")] * 3


def test_time_that_was_matched_has_the_residual_that_was_measured(tmp_path: Path) -> None:
    plans = tuple(variant(name, residual=None) for name in ("base", "good"))
    folder = study(tmp_path, {"base": of_seed(2.0), "good": of_seed(1.9)}, match="time", variants=plans)
    slow = folder / "cells" / plans[1].cells[0] / "metrics.jsonl"
    slow.write_text(slow.read_text().replace('"seconds": 3.0', '"seconds": 3.6'))
    shown = rows_of(read_study_record(folder), "What was held equal, and what it cost")["good"]
    assert shown[5] == "+5.00%"  # of four runs one took 20% longer


def test_every_seed_of_every_variant_has_its_curve_over_everything(made: StudyRecord) -> None:
    for column in (BITS, VIOLATION):
        for over in AXES:
            drawn = curves(made, column, over)
            assert drawn is not None
            lines = re.findall(r'<g id="[^"]*-line2d_\d+">\s*<path [^>]*clip-path', drawn)
            assert len(lines) >= 3 * (len(SEEDS) + 1)
    assert curves(made, "no such column", "tokens") is None
    assert forest(made, BITS) is not None


def test_a_stretch_is_the_mean_of_its_steps() -> None:
    trace = Trace(tuple(map(float, range(1, 11))), tuple(map(float, range(1, 11))))
    assert stretched(trace, 5) == Trace((2.0, 4.0, 6.0, 8.0, 10.0), (1.5, 3.5, 5.5, 7.5, 9.5))
    assert stretched(trace, 20) == trace
    assert stretched(Trace()) == Trace()


def test_what_a_study_says_of_itself_cannot_break_out(tmp_path: Path) -> None:
    record = read_study_record(
        study(tmp_path, {"base": of_seed(2), "good": of_seed(1)}, name=HOSTILE, statement=HOSTILE)
    )
    seen = Words(page(record))
    assert seen.policy == POLICY
    assert not {"script", "link", "iframe"} & set(seen.tags)
    text = latex(record)
    assert r"\_a|b \$\textbackslash{}frac\{1\}\% \#\textasciicircum{}\textasciitilde{}" in text


def test_the_raw_numbers_are_there(tmp_path: Path) -> None:
    folder = study(tmp_path, {"base": of_seed(2.0, 0), "good": of_seed(1.9)})
    path = write_study_report(folder)
    assert path == folder / "report.html"
    record = read_study_record(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(rows) == 2 * len(SEEDS)
    assert {float(row[BITS]) for row in rows if row["variant"] == "base"} == set(record.values("base", BITS).values())
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results(record)))
    assert table_of_cells(record) == (folder / "results.csv").read_text()


def test_the_same_directory_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = study(tmp_path, {"base": of_seed(2.0), "good": of_seed(1.9)})
    assert page(read_study_record(folder)) == page(read_study_record(folder))


def test_exact_commands_and_versions_are_told(made: StudyRecord) -> None:
    text = markdown(made)
    assert "tangram ablate 'a study.yaml'" in text
    assert "| torch | 2.13 |" in text


@pytest.mark.parametrize("damage", ["{", "[]", '{"name": 3}'])
def test_a_damaged_plan_is_told(damage: str, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_text(damage)
    with pytest.raises(ReportError, match=r"study.json is damaged"):
        read_study_record(tmp_path)


def test_what_is_no_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is no study"):
        read_study_record(tmp_path)
