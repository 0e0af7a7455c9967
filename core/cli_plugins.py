"""The command `new-plugin`; what it needs is imported inside it."""

from pathlib import Path

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
