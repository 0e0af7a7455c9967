"""Precision without low-precision products."""

from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import in_

from tangram.core.contracts import Precision
from tangram.core.layers import FullPrecision
from tangram.core.registry import component

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@component("precision", use="full")
@frozen(kw_only=True)
class FullConfig:
    """Compute every product in one dtype; parameters, gradients and optimizer state stay in float32.

    Attributes:
        compute: Dtype of activations and products. With float64 the parameters are float64 too: for proofs.
    """

    compute: Literal["float32", "bfloat16", "float64"] = field(default="float32", validator=in_(tuple(_DTYPES)))

    def build(self) -> Precision:
        """Build it."""
        return FullPrecision(_DTYPES[self.compute])
