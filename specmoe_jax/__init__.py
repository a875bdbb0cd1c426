"""specmoe_jax: Mixture-of-Experts models whose experts do not fit on the accelerator, fast and exact.

Each public name is imported when it is first used, so that `specmoe --help`, an error of usage and Ctrl-C do not wait for JAX.
"""

import importlib
import logging
import typing

if typing.TYPE_CHECKING:
    from specmoe_jax import ops, speculate
    from specmoe_jax.autotune.choose import make_plan
    from specmoe_jax.checkpoints import load_head, load_model, load_mtp
    from specmoe_jax.checkpoints.chat import chat_template
    from specmoe_jax.config.model_config import ModelConfig
    from specmoe_jax.config.plan import Plan
    from specmoe_jax.config.presets import PRESETS
    from specmoe_jax.config.sampling_params import SamplingParams
    from specmoe_jax.engine import Completion, Engine, Score, TokenEvent
    from specmoe_jax.jobs.features import read_features, write_features
    from specmoe_jax.models.model import Model, random_model
    from specmoe_jax.planner.hardware import Hardware
    from specmoe_jax.support.errors import CheckpointError, PlanError, RequestError, UserError
    from specmoe_jax.support.version import __version__

_MODULES = {
    "PRESETS": "config.presets",
    "CheckpointError": "support.errors",
    "Completion": "engine",
    "Engine": "engine",
    "Hardware": "planner.hardware",
    "Model": "models.model",
    "ModelConfig": "config.model_config",
    "Plan": "config.plan",
    "PlanError": "support.errors",
    "RequestError": "support.errors",
    "SamplingParams": "config.sampling_params",
    "Score": "engine",
    "TokenEvent": "engine",
    "UserError": "support.errors",
    "__version__": "support.version",
    "chat_template": "checkpoints.chat",
    "load_head": "checkpoints",
    "load_model": "checkpoints",
    "load_mtp": "checkpoints",
    "make_plan": "autotune.choose",
    "random_model": "models.model",
    "read_features": "jobs.features",
    "write_features": "jobs.features",
}
_ROOMS = ("autotune", "checkpoints", "config", "engine", "evaluation", "jobs", "kv_cache", "models", "offload", "ops", "planner",
          "speculate", "support", "testing", "types")  # fmt: skip

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless a program asks: logging.basicConfig(level="INFO")

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Completion",
    "Engine",
    "Hardware",
    "Model",
    "ModelConfig",
    "Plan",
    "PlanError",
    "RequestError",
    "SamplingParams",
    "Score",
    "TokenEvent",
    "UserError",
    "__version__",
    "chat_template",
    "load_head",
    "load_model",
    "load_mtp",
    "make_plan",
    "ops",
    "random_model",
    "read_features",
    "speculate",
    "write_features",
]


def __getattr__(name: str) -> typing.Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"specmoe_jax.{_MODULES[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"specmoe_jax.{name}")
    else:
        raise AttributeError(f"module 'specmoe_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
