"""Observers with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch

from tangram.core.hookspecs import HOOKIMPL
from tangram.core.model import Model
from tangram.core.records import StepReport


class _Meddling:
    """An observer that does something after each step, and nothing else."""

    def __init__(self, act: Callable[[Model], object]) -> None:
        self._act, self._models = act, list[Model]()

    @HOOKIMPL
    def tangram_model_built(self, model: Model) -> None:
        self._models.append(model)

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        for model in self._models:
            self._act(model)


def moves_a_weight(observer: Any) -> Any:
    """After each step it moves a weight."""
    return _Meddling(lambda model: next(model.parameters()).data.mul_(1 + 1e-6))


def draws_a_number(observer: Any) -> Any:
    """After each step it draws from torch's generator, which others draw from."""
    return _Meddling(lambda model: torch.rand(()))


def misspells_a_hook(observer: Any) -> Any:
    """It watches a moment that no run has, and so never sees it."""
    observer.__class__ = type("Misspelt", (type(observer),), {"tangram_step_endet": HOOKIMPL(lambda self: None)})
    return observer


def forgets_its_state(observer: Any) -> Any:
    """What it has seen is lost on resume."""
    observer.load_state = lambda state: None
    return observer
