"""The launcher of this machine: every job once, no more at once than asked, nothing left running."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from toy_study import NURSERY, study

from tangram.core import cell_worker
from tangram.core.cells import cells_of
from tangram.core.cli import main
from tangram.core.contracts import Job
from tangram.plugins.launchers.local import Local, LocalConfig


def python(name: str, code: str, *arguments: object) -> Job:
    return Job(name, (sys.executable, "-c", code, *map(str, arguments)))


def test_every_job_ends_once_with_its_exit_code(tmp_path: Path) -> None:
    says = "import sys; print('said', sys.argv[1]); sys.exit(int(sys.argv[1]))"
    jobs = [python(str(code), says, code) for code in (0, 1, 75)]
    killed = python("killed", "import os; os.kill(os.getpid(), 9)")
    ended = {job.name: code for job, code in Local(2).run([*jobs, killed], tmp_path)}
    assert ended == {"0": 0, "1": 1, "75": 75, "killed": -signal.SIGKILL}
    assert (tmp_path / "75.log").read_text() == "said 75\n"


MEETS = """
import sys
a, b = sys.argv[1:]
if a < b:
    open(a, "w").close(); open(b).close()
else:
    open(b).close(); open(a, "w").close()
"""


def test_jobs_run_beside_each_other(tmp_path: Path) -> None:
    """Each waits for the other at two pipes: one after the other they would never end."""
    a, b = tmp_path / "a", tmp_path / "b"
    os.mkfifo(a), os.mkfifo(b)
    jobs = [python("1", MEETS, a, b), python("2", MEETS, b, a)]
    assert sorted(code for _, code in Local(2).run(jobs, tmp_path)) == [0, 0]


COUNTS = """
import os, sys
from pathlib import Path
here = Path(sys.argv[1])
(here / str(os.getpid())).touch()
print(len(list(here.iterdir())))
(here / str(os.getpid())).unlink()
"""


def test_no_more_run_at_once_than_there_are_workers(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    jobs = [python(str(i), COUNTS, tmp_path / "here") for i in range(6)]
    assert {code for _, code in Local(1).run(jobs, tmp_path)} == {0}
    assert {(tmp_path / f"{i}.log").read_text() for i in range(6)} == {"1\n"}


def test_workers_times_threads_are_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [(Local(n).workers, Local(n).threads) for n in (0, 1, 2, 3, 8, 20)] == [
        (8, 1),
        (1, 8),
        (2, 4),
        (3, 2),
        (8, 1),
        (20, 1),
    ]
    job = python("threads", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])")
    list(Local(2).run([job], tmp_path))
    assert (tmp_path / "threads.log").read_text() == "4 4\n"


STOPS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
signal.pause()
"""


def test_closing_stops_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    """The second ends when the first waits for its signal already; the third would begin after it, and may not."""
    started = tmp_path / "started"
    os.mkfifo(started)
    jobs = [
        python("long", STOPS, started),
        python("short", "import sys; open(sys.argv[1]).close()", started),
        python("later", STOPS, started),
        python("last", "pass"),
    ]
    running = Local(2).run(jobs, tmp_path)
    assert next(running)[0].name == "short"
    running.close()
    assert not (tmp_path / "last.log").exists()


def test_a_study_runs_what_is_not_done_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cell is left, for a process has to load torch."""
    monkeypatch.chdir(tmp_path)
    asked = study(tmp_path, {"seeds: 3": "seeds: 1", "{use: forking}": "{use: local}"})
    first = cells_of(asked, tmp_path / "studies/toy/cells")[0]
    assert cell_worker.main([f"studies/toy/cells/{first.id}", "--plugin", str(NURSERY)]) == 0
    with pytest.raises(SystemExit) as exited:
        main(["ablate", "study.yaml", "--json", "--plugin", str(NURSERY)])
    out, err = capsys.readouterr()
    assert exited.value.code == 0, err
    assert [cell["state"] for cell in json.loads(out[out.index("{") :])["cells"]] == ["done", "done"]
    assert "1 of 2 cells are done already\n2/2 done: wide, seed 0: done\n" in err


def test_the_config_builds_it() -> None:
    assert LocalConfig(workers=3).build().workers == 3
