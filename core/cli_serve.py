"""The command `serve`; what it needs is imported inside it."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tangram.core.parameters import Files
from tangram.core.terminal import refuse


def serve(
    model: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch: int = 16,
    queue: int = 256,
    context: int | None = None,
    body: int = 1 << 20,
    seconds: float = 120.0,
    speculate: bool = False,
    ema: bool = False,
    prefill_workers: int = 0,
    decode_workers: int = 0,
    plugin: Files = (),
) -> int:
    """Serve a trained model to clients of OpenAI's interface, until SIGTERM or Ctrl-C.

    Args:
        model: A run directory, or a folder of weights in the format of DeepSeek-V3's release.
        host: The address to bind; by default 127.0.0.1, which only this machine reaches.
        port: The port, by default 8000; 0 for any that is free, which is printed.
        batch: Texts that a worker continues at once; 16 by default.
        queue: Texts that may wait beyond those, 256 by default; more are refused with 429.
        context: Most tokens of a prompt and its continuation; by default what the model was trained on.
        body: Most bytes of a request; 1 MiB by default.
        seconds: Most seconds that a request may take; 120 by default.
        speculate: Draft tokens with the model's MTP modules.
        ema: Take the averaged weights that the observer ema kept.
        prefill_workers: Processes that read prompts, and hand the cache to those that continue them; 0 by default.
        decode_workers: Processes that continue texts; 0, the default, for a thread of this process.
    """
    least = {"batch": (batch, 1), "queue": (queue, 0), "context": (context or 2, 2), "body": (body, 1)}
    least |= {"prefill-workers": (prefill_workers, 0), "decode-workers": (decode_workers, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            return refuse(f"--{name} is at least {bound}")
    if not seconds > 0:
        return refuse("--seconds is more than 0")
    if not 0 <= port < 1 << 16:
        return refuse("--port is from 0 to 65535")
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        return refuse(f"serving needs {' and '.join(missing)}: pip install 'tangram-lm[serve]'")
    # By its name: serving stands above the core.
    command = import_module("tangram.plugins.serving.command")
    settings = command.Settings(
        run=model,
        ema=ema,
        plugins=plugin,
        host=host,
        port=port,
        batch=batch,
        queue=queue,
        context=context,
        body=body,
        seconds=seconds,
        speculate=speculate,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
    )
    return int(command.serve(settings))
