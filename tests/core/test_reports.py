"""The report: everything is told from the run directory alone, nothing is loaded, and gaps are said."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SMALL, tiny

from tangram.core.cli import main
from tangram.core.figures import (
    COLUMNS,
    FIGURES,
    bits_per_byte,
    flops_of,
    losses_over_tokens,
    parameters_of,
    stretches,
    thinned,
    violation_by_layer,
)
from tangram.core.markup import POLICY
from tangram.core.pages import NO_DATA, page, write_report
from tangram.core.presets import to_yaml
from tangram.core.reports import ReportError, RunRecord, Setting, Trace, read_run
from tangram.core.run import train

STEPS = 6
HOSTILE = "</title><script>alert(1)</script>\" onload='x' $\\frac & _a"


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.policy = ""
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(f"train.tokens={48 * STEPS}"), directory)
    metrics = directory / "metrics.jsonl"
    bits = {"step": STEPS, "tokens": 48 * STEPS, "eval.bits_per_byte": 2.5, "eval.complete": True}
    fp8 = {"eval.fp8_error.0": 0.04, "eval.fp8_underflow.0": 1e-4, "eval.fp8_peak.0": 3.0}
    metrics.write_text(metrics.read_text() + json.dumps(bits | fp8) + "\n")  # the synthetic data hold nothing out
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_every_promised_figure_is_drawn_and_nothing_is_loaded(run: Path) -> None:
    text = write_report(run).read_text()
    seen = Page(text)
    assert seen.tags.count("svg") == len(FIGURES)
    assert seen.policy == POLICY
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith(("#", "data:image/")), value
        assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text
    assert "mathdefault" not in text  # a label that was meant to be typeset


def test_an_id_stands_once_and_every_reference_has_its_target(run: Path) -> None:
    seen = Page(write_report(run).read_text())
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for name, value in seen.attributes if name.endswith("href") and value and value[0] == "#"}
    assert wanted <= set(ids)


def test_a_report_repeats_byte_for_byte(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_the_load_counts_every_choice_of_every_step(run: Path) -> None:
    load = read_run(run).load
    assert set(load) == {1, 2, 3}
    trunk = [sum(load[layer]) for layer in (1, 2)]
    assert trunk == [48 * STEPS * 2] * 2  # tokens, each with two experts
    assert all(len(counts) == 8 for counts in load.values())


def test_every_layer_with_a_router_is_a_line_and_of_many_each_is_a_row_of_a_map(run: Path) -> None:
    record = read_run(run)
    traces = record.by_layer("violation", "step")
    assert {layer: len(trace.y) for layer, trace in traces.items()} == {1: STEPS, 2: STEPS, 3: STEPS}
    drawn = violation_by_layer(record) or ""
    assert all(f"layer {layer}" in drawn for layer in traces)
    assert "<image" not in drawn
    rows = [{"step": step, **{f"violation.{layer}": step + layer for layer in range(58)}} for step in range(1, 1000)]
    drawn = violation_by_layer(evolve(record, steps=tuple(rows))) or ""
    assert drawn.count("<image") == 2  # the map and its scale
    assert "layer 3" not in drawn


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 900), st.integers(1, 4), st.data())
def test_a_peak_of_one_step_is_seen_in_a_map_of_any_length(first: int, steps: int, layers: int, data: st.DataObject):
    layer, peak = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, steps - 1))
    x = tuple(map(float, range(first, first + steps)))
    flat = Trace(x, (0.5,) * steps)
    raised = Trace(x, tuple(9.0 if i == peak else 0.5 for i in range(steps)))
    cells = stretches({each: raised if each == layer else flat for each in range(layers)})
    assert {len(row) for row in cells} == {min(steps, COLUMNS)}
    assert [max(row) for row in cells] == [9.0 if each == layer else 0.5 for each in range(layers)]
    assert cells[layer].count(9.0) == 1
    assert cells[layer].index(9.0) == peak * len(cells[layer]) // steps


def test_losses_of_routing_have_an_axis_of_their_own_where_those_of_tokens_are_known(run: Path) -> None:
    record = read_run(run)
    assert record.objectives == ("mtp", "next_token", "sequence_balance")
    known = evolve(record, evaluations=({"step": 1, "eval.loss.mtp": 1.0, "eval.loss.next_token": 1.0},))
    axes = [text.count('id="losses-tokens-axes_') for text in map(losses_over_tokens, (record, known)) if text]
    assert axes == [1, 2]


def test_the_evaluation_on_all_text_is_no_point_of_the_curve_on_part_of_it(run: Path) -> None:
    record = read_run(run)
    part = tuple({"step": step, "tokens": 48 * step, "eval.bits_per_byte": 3.0} for step in (0, 1))
    assert record.evaluated("eval.bits_per_byte").y == (2.5,)
    both = evolve(record, evaluations=(*part, *record.evaluations))
    assert both.evaluated("eval.bits_per_byte") == Trace((0.0, 48.0), (3.0, 3.0))
    drawn, alone = bits_per_byte(both), bits_per_byte(record)
    assert drawn is not None
    assert alone is not None
    assert "this run, on part of the text" in drawn
    assert "on all of it (2.50)" in drawn
    assert "on part" not in alone


def test_averaged_weights_stand_beside_the_last_ones(run: Path) -> None:
    averages = {"ema": {"tokens": 48 * STEPS, "eval.bits_per_byte": 2.25, "eval.complete": True}}
    record = evolve(read_run(run), averaged=averages)
    words = Page(page(record)).words
    assert words.count("averaged by ema2.250") == 2  # at the top and in the table
    assert words.count("last2.500") == 1
    assert "averaged by ema (2.25)" in words  # in the figure


def test_names_and_values_of_the_user_are_text_and_never_markup(run: Path) -> None:
    record = read_run(run)
    steps = [{**row, f"loss.{HOSTILE}": 1.0} for row in record.steps]
    hostile = RunRecord(
        name=HOSTILE,
        settings=(Setting(HOSTILE, HOSTILE, HOSTILE),),
        steps=tuple(steps),
        evaluations=record.evaluations,
        sample=HOSTILE,
        command=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        data=HOSTILE,
        references={HOSTILE: 2.0},
        gaps=(HOSTILE,),
    )
    seen = Page(page(hostile))
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE in seen.words


def test_a_hostile_preset_goes_through_the_directory_as_text(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(to_yaml(tiny()).replace("name: v3-tiny", f"name: {json.dumps(HOSTILE)}"))
    seen = Page(write_report(tmp_path).read_text())
    assert "script" not in seen.tags
    assert HOSTILE in seen.words


FILES = ("metrics.jsonl", "about.json", "origins.json", "load.json", "verdict.json")


@pytest.mark.parametrize("missing", FILES)
def test_what_is_damaged_leaves_a_gap(run: Path, missing: str) -> None:
    assert not read_run(run).gaps
    (run / missing).write_text('{"cut off')
    assert missing in " ".join(read_run(run).gaps)


def test_a_run_of_which_only_the_preset_is_left_has_a_report(run: Path) -> None:
    for missing in FILES:
        (run / missing).unlink()
    words = Page(write_report(run).read_text()).words
    assert "there is no metrics.jsonl" in words
    assert NO_DATA in words


def test_a_run_without_experts_or_held_out_text_says_no_data(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    routed = ("violation", "bias")
    plain = [{k: v for k, v in row.items() if not k.startswith(routed)} for row in rows if "loss" in row]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (run / "load.json").unlink()
    text = write_report(run).read_text()
    assert Page(text).tags.count("svg") == len(FIGURES) - 8
    assert NO_DATA in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"experiment\.yaml"):
        write_report(tmp_path)


def test_parts_add_up_to_the_whole(run: Path) -> None:
    measures = read_run(run).measures
    assert measures is not None
    assert sum(parameters_of(measures).values()) == measures.parameters.total + measures.parameters.mtp
    assert sum(flops_of(measures).values()) == measures.training_flops_per_token
    assert min(*flops_of(measures).values(), *parameters_of(measures).values()) >= 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 100))
def test_thinning_keeps_the_ends_the_peaks_and_the_order(values: list[float], limit: int) -> None:
    kept = thinned(Trace(tuple(map(float, range(len(values)))), tuple(values)), limit)
    assert len(kept.x) <= max(limit, 2)
    assert list(kept.x) == sorted(set(kept.x))
    assert (kept.x[0], kept.x[-1]) == (0, len(values) - 1)
    assert (min(kept.y), max(kept.y)) == (min(values), max(values))
    assert all(values[int(x)] == y for x, y in zip(kept.x, kept.y, strict=True))


def test_the_command_writes_the_report_with_the_origin_of_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for arguments, code in (
        (["report", str(run)], 2),
        (["train", "v3-tiny", *SMALL, "train.tokens=48", "--out", str(run)], 0),
        (["report", str(run)], 0),
    ):
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        assert exited.value.code == code
        assert (run / "report.html").exists() == (code == 0)
    assert {s.path: s.origin for s in read_run(run).settings}["model.dim"] == "model.dim=16"
    assert "warning" not in capsys.readouterr().err
