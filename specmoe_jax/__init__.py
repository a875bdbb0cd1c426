"""specmoe_jax: Mixture-of-Experts models whose experts do not fit on the accelerator, fast and exact."""

from specmoe_jax import ops, speculate
from specmoe_jax.autotune.choose import make_plan
from specmoe_jax.checkpoints import load_head, load_model, load_mtp
from specmoe_jax.checkpoints.chat import chat_template
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Completion, Engine, TokenEvent
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.support.errors import CheckpointError, PlanError, RequestError, UserError
from specmoe_jax.support.version import __version__

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Completion",
    "Engine",
    "Model",
    "ModelConfig",
    "Plan",
    "PlanError",
    "RequestError",
    "SamplingParams",
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
    "speculate",
]
