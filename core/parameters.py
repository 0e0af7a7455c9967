"""The parameters that commands share, described once."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Overrides = Annotated[str, Parameter(help="Changes to the preset: dotted.path=value.")]
Files = Annotated[
    tuple[Path, ...], Parameter(name="--plugin", negative="", help="A plugin file to load; may be repeated.")
]
