"""What a run scored comes back from its folder as it was, the report shows it, and what is damaged is a gap."""

from pathlib import Path

import pytest
from attrs import evolve

from tangram.core.figures import needle_map
from tangram.core.pages import page
from tangram.core.reports import RunRecord
from tangram.core.scores import Metric, NeedleGrid, TaskScore, read_grids, read_scores, write_grid, write_score

SCORE = TaskScore("a/b: <c>", "last", 20, 24, 0, (Metric("acc", 0.25, 0.125), Metric("</td>", None)))
GRID = NeedleGrid("last", 20, "held-out", 512, 4, (128, 512), (0.0, 0.5, 1.0), ((0.0, 0.25), (0.5, 0.75), (1.0, 1.0)))


def test_what_is_written_is_read_again_and_a_later_one_takes_its_place(tmp_path: Path) -> None:
    gaps: list[str] = []
    assert (read_scores(tmp_path, gaps), read_grids(tmp_path, gaps)) == ((), ())
    averaged = evolve(SCORE, weights="averaged", step=7)
    for score in (evolve(SCORE, items=1), SCORE, averaged):
        path = write_score(tmp_path, score)
        assert path.parent == tmp_path / "evaluations"
    write_grid(tmp_path, GRID)
    assert set(read_scores(tmp_path, gaps)) == {SCORE, averaged}
    assert read_grids(tmp_path, gaps) == (GRID,)
    assert not gaps


@pytest.mark.parametrize("content", ['{"cut off', "[]", "{}", '{"task": 1}', '{"scores": [[1]]}'])
@pytest.mark.parametrize("name", ["needle.json", "other.json"])
def test_what_is_damaged_is_a_gap(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / name).write_text(content)
    gaps: list[str] = []
    assert (read_scores(tmp_path, gaps), read_grids(tmp_path, gaps)) == ((), ())
    assert gaps == [f"evaluations/{name} is damaged; evaluate again"]


def test_a_grid_of_another_shape_than_it_says_is_a_gap(tmp_path: Path) -> None:
    gaps: list[str] = []
    write_grid(tmp_path, evolve(GRID, lengths=(128,)))
    assert read_grids(tmp_path, gaps) == ()
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
