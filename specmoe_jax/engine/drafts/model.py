"""Another model as the draft: every expert resident, run through the target's own passes."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS
from specmoe_jax.engine import stages
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.runtime import build, new_cache
from specmoe_jax.models.model import Model
from specmoe_jax.planner.drafts.model import resident_plan
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.speculate.drafts.model_draft import ModelDraft, vocabulary_difference
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import KVCache


class ModelExecutor(DraftExecutor):
    def check(self, model: Model, inputs: DraftInputs) -> None:
        """Refuses a model with an encoder, and one whose vocabulary is another than the target's."""
        if _model(inputs).config.encoder is not None:
            raise PlanError("the draft model is an encoder-decoder; draft=model is built for decoders alone")
        difference = vocabulary_difference(model, _model(inputs))
        if difference:
            raise PlanError(f"the draft model cannot draft for this one: {difference}; give one of the same family")

    def memory(self, model: Model, plan: Plan, inputs: DraftInputs) -> DraftMemory:
        draft_model = _model(inputs)
        return plan.drafting.memory(plan.replace(dtype=draft_model.dtype), model.config, model=draft_model.config)

    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> ModelDraft:
        """Copies the draft model to the accelerator, in the dtype that it was loaded in."""
        draft_model = _model(inputs)
        config, own = draft_model.config, resident_plan(draft_model.config, plan.replace(dtype=draft_model.dtype))
        counted = account(config, own, batch_rows=1, positions=1)
        runtime = build(draft_model, own, counted, None, progress=False)
        flow = EXPERT_FLOWS.executor(own.flow.name)
        on, replayed = runtime.context.place, plan.tokens_per_pass - 1
        dtype, nothing = draft_model.dtype, np.zeros((config.num_moe_layers, config.num_experts), np.int64)
        memory = flow.first_memory(runtime)

        def forward(kv: KVCache, tokens, lengths, num_new):
            done = flow.target_pass(runtime, memory, kv, tokens, lengths, num_new, earlier=nothing, predicted=nothing)
            return stages.head(config.head, runtime.weights.outer, _last_new(done.h, num_new))[:, 0], done.kv

        return ModelDraft(
            forward=forward,
            new_cache=lambda rows, positions: new_cache(config, rows, positions, dtype, on, replayed=replayed, states=on),
            chunk=plan.prefill_chunk,
        )


@jax.jit
def _last_new(h: jax.Array, num_new: jax.Array) -> jax.Array:
    """h [B, T, M] -> [B, 1, M], of the last new position; the first where there is none."""
    return jnp.take_along_axis(h, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)


def _model(inputs: DraftInputs) -> Model:
    """That it was given has been checked."""
    assert inputs.draft_model is not None
    return inputs.draft_model


DRAFT = ModelExecutor()
