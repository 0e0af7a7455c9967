"""The commands `new-plugin` and `check-plugin`; what they need is imported inside them."""

from importlib import import_module
from pathlib import Path
from typing import Literal

from tangram.core.parameters import Files, Json
from tangram.core.terminal import OK, refuse, say


def new_plugin(name: str, /, *, slot: str, out: Path | None = None) -> int:
    """Write a package with a component of your own: one that works, with tests and a study, to change.

    Args:
        name: Of the package, such as acme-window; the component's is the same with _ for -.
        slot: What the component is to be: attention, router, objective, ...
        out: The folder of the package, new or empty; by default ./NAME.
    """
    from tangram.core.plugins import Plugins
    from tangram.core.scaffold import ScaffoldError, write_package

    folder = out or Path(name)
    try:
        written = write_package(name, slot, folder, Plugins.discover())
    except (ScaffoldError, OSError) as error:
        return refuse(str(error))
    for path in written:
        say(str(path))
    say(f"try it: cd {folder} && python -m pytest && tangram describe {slot} {name.replace('-', '_')} --plugin *.py")
    return OK


def check_plugin(
    name: str,
    /,
    *,
    profile: Literal["ci", "full"] = "full",
    device: str = "cpu",
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    json_: Json = False,
    junit: Path | None = None,
    plugin: Files = (),
) -> int:
    """Try every law that components of a slot owe, and print what became of each.

    Args:
        name: A component such as attention.mla, or a distribution, a plugin file or a slot, for all of theirs.
        profile: ci tries 5 examples of each law, full 25; full by default.
        device: Where tensors are; cpu by default.
        dtype: Dtype of the products; float64 by default.
        junit: A file for the result as JUnit XML.
    """
    # By its name: the conformance kit stands above the core. The command line would import it for any mistyped command.
    command = import_module("tangram.testing.command")
    return int(command.check_plugin(name, profile, device, dtype, not json_, junit, plugin))
