"""The commands `export` and `import`; torch is imported inside them."""

import re
from pathlib import Path

from tangram.core.parameters import Files
from tangram.core.terminal import OK, fail, refuse, say

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export(run: Path, folder: Path, /, *, shard_size: str = "5GB", fp8: bool = False, plugin: Files = ()) -> int:
    """Write a run's newest checkpoint in the format of DeepSeek-V3's release, for transformers, vLLM and others.

    Args:
        run: The run directory.
        folder: Where to; new or empty.
        shard_size: Most bytes of weights in a file, such as 200MB; 5GB by default.
        fp8: Write the linears as E4M3 with a scale for each 128 x 128 block, as the release does.
    """
    from tangram.core.deepseek_format import FormatError
    from tangram.core.interchange import FullDiskError
    from tangram.core.interchange import export as write
    from tangram.core.weight_folder import InterchangeError

    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)", shard_size.upper())
    shard_bytes = int(float(size[1]) * _UNITS[size[2]]) if size else 0
    if not shard_bytes:
        return refuse(f"--shard-size {shard_size} is no size; write 5GB or 200MB")
    try:
        written = write(run, folder, shard_bytes=shard_bytes, fp8=fp8, plugins=plugin)
    except InterchangeError as error:
        return refuse(str(error))
    except FormatError as error:
        return refuse(f"{run / 'experiment.yaml'}: {error}")
    except FullDiskError as error:
        return fail(str(error))
    files = "one file" if written.files == 1 else f"{written.files} files"
    say(f"{folder}: step {written.step} of {run}, {written.parameters:,} numbers in {files}")
    say("with its tokenizer" if written.tokenizer else "without a tokenizer: the run was trained on no text")
    return OK


def import_(folder: Path, /, *overrides: str, out: Path | None = None, plugin: Files = ()) -> int:
    """Make a model in the format of DeepSeek-V3's release a run, to evaluate or to train further.

    Args:
        folder: A folder with config.json, weights and perhaps tokenizer.json.
        overrides: Changes to the run's experiment: dotted.path=value. The model stays what the folder says.
        out: The run directory; new or empty; by default below runs, with the folder's name.
    """
    from tangram.core.deepseek_format import FormatError
    from tangram.core.interchange import FullDiskError, import_model
    from tangram.core.tensor_file import TensorFileError
    from tangram.core.weight_folder import InterchangeError

    directory = out or Path("runs", folder.resolve().name)
    try:
        read = import_model(folder, directory, overrides, plugins=plugin)
    except (InterchangeError, TensorFileError) as error:
        return refuse(str(error))
    except FormatError as error:
        return refuse(f"{folder / 'config.json'}: {error}")
    except FullDiskError as error:
        return fail(str(error))
    depth = f"with {read.depth} further tokens predicted" if read.depth else "without multi-token prediction"
    say(f"{directory}: a run of {folder} that has taken no step, {depth}")
    if not read.tokenizer:
        say("there is no tokenizer.json, so its data is synthetic")
    say(f"train it further with `tangram train {directory / 'experiment.yaml'} --out {directory} --resume`")
    return OK
