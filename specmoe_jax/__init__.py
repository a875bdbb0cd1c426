"""specmoe_jax: Mixture-of-Experts models whose experts do not fit on the accelerator, fast and exact."""

from specmoe_jax import ops, speculate
from specmoe_jax.checkpoints import load_head, load_model
from specmoe_jax.config import PRESETS, ModelConfig, Plan, SamplingParams
from specmoe_jax.engine import Completion, Engine, TokenEvent
from specmoe_jax.engine.planning import make_plan
from specmoe_jax.errors import CheckpointError, PlanError, RequestError, UserError
from specmoe_jax.models.model import Model, random_model

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
    "load_head",
    "load_model",
    "make_plan",
    "ops",
    "random_model",
    "speculate",
]
