"""The observers keep the laws of their slot."""

from tangram.plugins.observers.console import ConsoleConfig
from tangram.plugins.observers.ema import EMAConfig
from tangram.plugins.observers.jsonl import JsonlConfig
from tangram.plugins.observers.profiler import ProfilerConfig
from tangram.plugins.observers.wandb import WandbConfig
from tangram.testing import ObserverContract


class TestConsole(ObserverContract):
    config = ConsoleConfig(every=1e-9)


class TestEMA(ObserverContract):
    config = EMAConfig(decay=0.5)


class TestJsonl(ObserverContract):
    config = JsonlConfig()


class TestProfiler(ObserverContract):
    config = ProfilerConfig(steps=(2, 2))


class TestWandb(ObserverContract):
    config = WandbConfig(mode="disabled")
