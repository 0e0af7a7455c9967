"""The report of a study: its tables and pictures as HTML, Markdown and LaTeX, and its numbers as JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from tangram.core.files import write_whole
from tangram.core.markup import document, dotted, figure, verbatim
from tangram.core.markup import table as html_table
from tangram.core.study_figures import AXES, curves, forest
from tangram.core.study_record import CellRecord, StudyRecord, read_study_record
from tangram.core.study_tables import Table, commands, tables

_LOSS = "loss.next_token"
"""A curve that is drawn in every study that has it."""


def write_study_report(directory: str | Path) -> Path:
    """Write the reports of a study into its directory, from what lies in it alone, and return the path of the page.

    Raises:
        ReportError: It is no study.
    """
    directory = Path(directory)
    record = read_study_record(directory)
    written = {
        "report.md": markdown(record),
        "report.tex": latex(record),
        "results.csv": table_of_cells(record),
        "results.json": json.dumps(results(record), indent=1),
        "report.html": page(record),
    }
    for name, text in written.items():
        write_whole(directory / name, text)
    return directory / "report.html"


# --- numbers ------------------------------------------------------------------------------------------------


def results(record: StudyRecord) -> dict[str, object]:
    """Return every number of a study as plain values."""
    plan = attrs.asdict(record.plan)
    cells = [attrs.asdict(cell.cell) | _numbers(record, cell) for row in record.cells.values() for cell in row.values()]
    compared = {}
    for metric in record.plan.metrics:
        rows = [
            {
                "variant": row.variant,
                "values": row.values,
                "difference": None if row.difference is None else attrs.asdict(row.difference),
                "p": row.p,
                "finding": row.finding.value,
            }
            for row in record.compare(metric)
        ]
        compared[metric] = {"noise": record.noise(metric), "variants": rows}
    return {"plan": plan, "cells": cells, "metrics": compared}


def _numbers(record: StudyRecord, cell: CellRecord) -> dict[str, float | None]:
    metrics = {metric: cell.value(metric) for metric in record.plan.metrics}
    return metrics | {"seconds": cell.seconds, "peak_rss": cell.memory}


def table_of_cells(record: StudyRecord) -> str:
    """Return a line of CSV for every cell."""
    text = io.StringIO()
    columns = ["variant", "seed", "id", "state", *record.plan.metrics, "seconds", "peak_rss", "why"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in record.cells.values():
        for cell in row.values():
            writer.writerow(attrs.asdict(cell.cell) | _numbers(record, cell))
    return text.getvalue()


# --- HTML ---------------------------------------------------------------------------------------------------


def page(record: StudyRecord) -> str:
    """Return the report as HTML. The same record gives the same text."""
    parts = []
    for i, table in enumerate(tables(record)):
        parts.append(_section(table, _forest(record, i)))
        if i == len(record.plan.metrics):
            parts.append(_curves(record))
    parts.append(f"<section>\n<h2>How it was run</h2>\n{verbatim(commands(record))}\n</section>")
    return document(record.plan.name, "\n".join(parts))


def _section(table: Table, pictures: str) -> str:
    caption = f"<p>{dotted(table.caption)}</p>\n" if table.caption else ""
    shown = (
        html_table([*map(dotted, table.header)], [list(map(dotted, row)) for row in table.rows]) if table.rows else ""
    )
    return f"<section>\n<h2>{dotted(table.title)}</h2>\n{caption}{shown}\n{pictures}</section>"


def _forest(record: StudyRecord, i: int) -> str:
    """Return the picture that belongs to the i-th table, if it is one of verdicts."""
    if i >= len(record.plan.metrics):
        return ""
    metric = list(record.plan.metrics)[i]
    caption = "Mean difference with its 95% interval; dots are pairs of runs, grey is the noise of the base."
    return figure(f"{metric}: differences", caption, forest(record, metric)) + "\n"


def _curves(record: StudyRecord) -> str:
    drawn = []
    for column in dict.fromkeys([*record.plan.metrics, _LOSS]):
        for over, axis in AXES.items():
            caption = "Thin: every seed. Thick: the mean of a variant's seeds."
            drawn.append(figure(f"{column} over {axis}", caption, curves(record, column, over)))
    pictures = "\n".join(drawn)
    return f'<section>\n<h2>Curves</h2>\n<div class="figures">\n{pictures}\n</div>\n</section>'


# --- Markdown and LaTeX -------------------------------------------------------------------------------------


def markdown(record: StudyRecord) -> str:
    """Return the report as Markdown."""
    parts = [f"# {record.plan.name}", ""]
    for table in tables(record):
        parts += [f"## {table.title}", ""]
        if table.caption:
            parts += [table.caption, ""]
        if table.rows:
            parts += [*_markdown_rows(table), ""]
    parts += ["## How it was run", "", "```sh", commands(record), "```", ""]
    return "\n".join(parts)


def _markdown_rows(table: Table) -> Iterator[str]:
    yield _piped(table.header)
    yield "|" + "---|" * len(table.header)
    yield from map(_piped, table.rows)


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


_LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}


def latex(record: StudyRecord) -> str:
    """Return the tables for a paper that uses the package booktabs."""
    return "\n".join(_latex_table(table) for table in tables(record) if table.rows)


def _latex_table(table: Table) -> str:
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex(table.title)}. {_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.header)}}}",
        r"\toprule",
        _latex_row(table.header),
        r"\midrule",
        *map(_latex_row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text.replace("\n", " "))
