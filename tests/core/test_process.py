import subprocess
import sys


def _threads(**environment: str) -> str:
    code = "import os; from tangram.core.process import settle; settle(); print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    assert _threads() == "PASSIVE"
    assert _threads(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
