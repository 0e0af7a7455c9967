"""What a run scored comes back from its folder as it was, the report shows it, and what is damaged is a gap."""

from pathlib import Path

import pytest
from attrs import evolve

from tangram.core.figures import needle_map, position_losses
from tangram.core.pages import page
from tangram.core.reports import RunRecord
from tangram.core.scores import (
    Metric,
    NeedleGrid,
    PositionLosses,
    TaskScore,
    read_grids,
    read_positions,
    read_scores,
    write_grid,
    write_positions,
    write_score,
)

SCORE = TaskScore("a/b: <c>", "last", 20, 24, 0, (Metric("acc", 0.25, 0.125), Metric("</td>", None)))
GRID = NeedleGrid("last", 20, "held-out", 512, 4, (128, 512), (0.0, 0.5, 1.0), ((0.0, 0.25), (0.5, 0.75), (1.0, 1.0)))

PLACED = PositionLosses("last", 20, 512, (64, 128, 1000), (7, 7, 9), (5.0, 4.5, 4.75))


def test_what_is_written_is_read_again_and_a_later_one_takes_its_place(tmp_path: Path) -> None:
    gaps: list[str] = []
    assert read_scores(tmp_path, gaps) == read_grids(tmp_path, gaps) == read_positions(tmp_path, gaps) == ()
    averaged = evolve(SCORE, weights="averaged", step=7)
    for score in (evolve(SCORE, items=1), SCORE, averaged):
        path = write_score(tmp_path, score)
        assert path.parent == tmp_path / "evaluations"
    write_grid(tmp_path, GRID)
    write_positions(tmp_path, PLACED)
    assert set(read_scores(tmp_path, gaps)) == {SCORE, averaged}
    assert read_grids(tmp_path, gaps) == (GRID,)
    assert read_positions(tmp_path, gaps) == (PLACED,)
    assert not gaps


@pytest.mark.parametrize("content", ['{"cut off', "[]", "{}", '{"task": 1}', '{"scores": [[1]]}'])
@pytest.mark.parametrize("name", ["needle.json", "positions.json", "other.json"])
def test_what_is_damaged_is_a_gap(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / name).write_text(content)
    gaps: list[str] = []
    assert read_scores(tmp_path, gaps) == read_grids(tmp_path, gaps) == read_positions(tmp_path, gaps) == ()
    assert gaps == [f"evaluations/{name} is damaged; evaluate again"]


def test_a_grid_of_another_shape_than_it_says_is_a_gap(tmp_path: Path) -> None:
    gaps: list[str] = []
    write_grid(tmp_path, evolve(GRID, lengths=(128,)))
    assert read_grids(tmp_path, gaps) == ()
    assert len(gaps) == 1


def test_losses_of_other_ranges_than_they_say_are_a_gap(tmp_path: Path) -> None:
    gaps: list[str] = []
    write_positions(tmp_path, evolve(PLACED, losses=(5.0,)))
    assert read_positions(tmp_path, gaps) == ()
    assert len(gaps) == 1


def test_the_report_shows_the_scores_as_text_and_a_map_of_each_grid() -> None:
    text = page(RunRecord("run", (), scores=(SCORE,), grids=(GRID, evolve(GRID, weights="averaged"))))
    assert "0.250 ± 0.125" in text
    assert "<c>" not in text
    assert "<td></td>" not in text
    assert text.count("<svg") == 2
    assert "trained on 512 tokens at a time" in text


def test_a_map_says_the_facts_of_every_place() -> None:
    drawn = needle_map(GRID)
    for words in ("128", "512", "0%", "50%", "100%", "depth of the fact", "tokens of the context"):
        assert f">{words}</text>" in drawn, words
    counts = [line.split(">")[1].split("<")[0] for line in drawn.splitlines() if "text-anchor: middle" in line]
    assert [int(word) for word in counts if word in {"0", "1", "2", "3", "4"}] == [0, 1, 2, 3, 4, 4]
    assert needle_map(GRID) == drawn


def test_losses_are_drawn_over_the_ranges_they_are_of() -> None:
    drawn = position_losses(PLACED)
    for words in ("64", "128", "1,000", "position", "loss, nats per token", "trained on so many at a time"):
        assert f">{words}</text>" in drawn, words
    assert position_losses(PLACED) == drawn != position_losses(evolve(PLACED, losses=(5.0, 4.75, 4.5)))
    assert "trained on" not in position_losses(evolve(PLACED, trained=1000))  # nothing lies beyond
