"""DeepSeekMoE, built step by step: the package that every chapter of the course imports.

Its main names are importable from here, each loaded when it is first used: `from dsmoe_lite import MoELayer, train`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsmoe_lite.checkpoint import load_model as load_model
    from dsmoe_lite.checkpoint import save_model as save_model
    from dsmoe_lite.config import AttentionConfig as AttentionConfig
    from dsmoe_lite.config import MLAConfig as MLAConfig
    from dsmoe_lite.config import ModelConfig as ModelConfig
    from dsmoe_lite.config import MoEConfig as MoEConfig
    from dsmoe_lite.layers.moe import MoELayer as MoELayer
    from dsmoe_lite.layers.router import Router as Router
    from dsmoe_lite.layers.router import Routing as Routing
    from dsmoe_lite.model import Transformer as Transformer
    from dsmoe_lite.presets import preset as preset
    from dsmoe_lite.routing.trace import RoutingTrace as RoutingTrace
    from dsmoe_lite.training.config import TrainConfig as TrainConfig
    from dsmoe_lite.training.train import train as train

_MODULES = {
    "AttentionConfig": "config",
    "MLAConfig": "config",
    "MoEConfig": "config",
    "MoELayer": "layers.moe",
    "ModelConfig": "config",
    "Router": "layers.router",
    "Routing": "layers.router",
    "RoutingTrace": "routing.trace",
    "TrainConfig": "training.config",
    "Transformer": "model",
    "load_model": "checkpoint",
    "preset": "presets",
    "save_model": "checkpoint",
    "train": "training.train",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
