"""What every preset owes, shipped or a package's own: it resolves, what is dumped of it is the same, and it builds."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tangram.core.assembly import rehearse
from tangram.core.plugins import Plugins
from tangram.core.presets import available, digest, load_preset, to_yaml


def check_preset(preset: str | Path, *overrides: str, plugins: Sequence[str | Path] = ()) -> None:
    """Assert the laws of a preset; whoever ships one has them from one line.

    It resolves, and again to the same experiment. What is dumped of it, every default spelled out, is a preset that
    resolves to it, under the same hash. One that is named has the name of its file. It is built without memory, its
    data too, and every step of it is laid out, as `tangram check` does.

    Args:
        preset: Its name, or its file.
        *overrides: Dotted overrides on top.
        plugins: Plugin files that it needs.

    Raises:
        AssertionError: One does not hold.
        ConfigError: It does not resolve.
        BuildError: It cannot be built.
    """
    experiment = load_preset(preset, *overrides, plugins=plugins)
    assert load_preset(preset, *overrides, plugins=plugins) == experiment, "resolved again it is another experiment"
    with TemporaryDirectory() as folder:
        file = Path(folder, "again.yaml")
        file.write_text(to_yaml(experiment), encoding="utf-8")
        again = load_preset(file, plugins=plugins)
    assert again == experiment, "what is dumped of it resolves to another experiment"
    assert digest(again) == digest(experiment), "what is dumped of it has another hash"
    shipped = available(Plugins.discover(plugins))
    if str(preset) in shipped:
        assert experiment.name == preset, f"'{preset}' calls itself '{experiment.name}'"
    assert rehearse(experiment).steps > 0, "it takes no step"
