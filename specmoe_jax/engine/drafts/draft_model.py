"""The engine's half of draft=model: another model, every expert resident, as the function that its draft calls."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.registry import EXPERT_FLOWS
from specmoe_jax.engine import stages
from specmoe_jax.engine.runtime import build, new_cache
from specmoe_jax.models.model import Model
from specmoe_jax.planner.memory.account import account
from specmoe_jax.speculate.drafts.model_draft import ModelDraft, vocabulary_difference
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import KVCache


def make_model_draft(target: Model, model: Model, plan: Plan) -> ModelDraft:
    """Copies the model to the accelerator. Raises PlanError when its vocabulary is another than the target's."""
    if model.config.encoder is not None:
        raise PlanError("the draft model is an encoder-decoder; draft=model is built for decoders alone")
    difference = vocabulary_difference(target, model)
    if difference:
        raise PlanError(f"the draft model cannot draft for this one: {difference}; give one of the same family")
    own = resident_plan(model, plan)
    runtime = build(model, own, account(model.config, own, batch_rows=1, positions=1), None, earlier=None, progress=False)
    flow = EXPERT_FLOWS.executor(own.flow.name)
    memory, nothing = flow.first_memory(runtime), np.zeros((model.config.num_moe_layers, model.config.num_experts), np.int64)

    def forward(kv: KVCache, tokens, lengths, num_new):
        done = flow.target_pass(runtime, memory, kv, tokens, lengths, num_new, earlier=nothing, predicted=nothing)
        return stages.head(model.config.norm_eps, runtime.weights, _last_new(done.h, num_new))[:, 0], done.kv

    return ModelDraft(
        forward=forward,
        new_cache=lambda rows, positions: new_cache(model.config, rows, positions, model.dtype, runtime.device),
        chunk=plan.prefill_chunk,
    )


def resident_plan(model: Model, plan: Plan) -> Plan:
    """How the draft model runs: as the resident preset, in the dtype it was loaded in."""
    return preset("resident", model.config).replace(dtype=model.dtype, prefill_chunk=plan.prefill_chunk)


@jax.jit
def _last_new(h: jax.Array, num_new: jax.Array) -> jax.Array:
    """h [B, T, M] -> [B, 1, M], of the last new position; the first where there is none."""
    return jnp.take_along_axis(h, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)
