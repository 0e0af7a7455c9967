"""C++ that is compiled when it is first called for, without any header of torch: in about two seconds, and once.

The library is kept below `$XDG_CACHE_HOME` or `~/.cache`, under a name that its source, the compiler and the
processor decide.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def compiler() -> str | None:
    """Return the path of the C++ compiler, that of the variable CXX or the system's; None where there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled source, or None where there is no C++ compiler.

    Raises:
        RuntimeError: The compiler refuses the source.
    """
    path = compiler()
    if path is None:
        return None
    text = source.read_bytes()
    decides = (text, path, _version(path), _FLAGS, _processor())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tangram"
    kept = folder / f"{source.stem}-{sha256(repr(decides).encode()).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(kept))
    except OSError:
        pass  # not there yet, or not whole
    with tempfile.TemporaryDirectory() as made:
        built = Path(made) / kept.name
        command = [path, *_FLAGS, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; set CXX to another C++ compiler:\n{done.stderr}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside = folder / f".{kept.name}.{os.getpid()}"
            shutil.copyfile(built, beside)
            beside.replace(kept)
        except OSError:
            return ctypes.CDLL(str(built))  # it stays loaded when its file goes
    return ctypes.CDLL(str(kept))


def _version(path: str) -> str:
    return subprocess.run(
        [path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False
    ).stdout


def _processor() -> str:
    """Return what `-march=native` sees of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
