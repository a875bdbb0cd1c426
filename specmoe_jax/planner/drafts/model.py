"""A smaller model of the same vocabulary as the draft: every expert resident, with a KV cache of its own."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.kv_cache.tiers import ON_ACCELERATOR
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.planner.costs import Load, expert_bytes
from specmoe_jax.planner.drafts.checks import check_decoder
from specmoe_jax.planner.drafts.protocol import DraftCosts, DraftDescription
from specmoe_jax.planner.layer_costs import resident_pass
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.support.errors import PlanError


class ModelDraftDescription(DraftDescription):
    name = "model"
    several_devices = True
    given = "draft_model"
    assumed_acceptance = 0.6

    def check(self, plan: Plan, config: ModelConfig) -> None:
        check_decoder(plan, config)
        super().check(plan, config)

    def memory(self, plan: Plan, config: ModelConfig, *, head=None, model: ModelConfig | None = None) -> DraftMemory:
        """Nothing for a model that is not known."""
        return DraftMemory() if model is None else model_memory(model, resident_plan(model, plan))

    def costs(
        self, plan: Plan, config: ModelConfig, load: Load, *, skew: float, model: ModelConfig | None = None, **_
    ) -> DraftCosts:
        """It first reads what was committed (padded to all of the pass's), then writes."""
        if model is None:
            raise PlanError("draft=model is predicted from the draft model's configuration; give Workload(draft_model=...)")
        itemsize, length = DTYPE_BYTES[plan.dtype], plan.draft_length or 1
        one = Load(load.rows, 1, load.context + length / 2)
        used = float(model.num_experts) if model.num_moe_layers else 0.0
        packed = expert_bytes(model, resident_plan(model, plan)) if model.num_moe_layers else None
        catch_up = resident_pass(model, load, used, itemsize, tier=ON_ACCELERATOR, expert_bytes=packed)
        used = min(used, load.rows * model.experts_per_token)
        token = resident_pass(model, one, used, itemsize, tier=ON_ACCELERATOR, expert_bytes=packed)
        return DraftCosts(costs=(*catch_up, *(token * (length - 1))))


def resident_plan(model: ModelConfig, plan: Plan) -> Plan:
    """How a draft model runs: as the resident preset, in the dtype and prefill chunks of a plan and on its devices."""
    return preset("resident", model).replace(dtype=plan.dtype, prefill_chunk=plan.prefill_chunk, devices=plan.devices)


def model_memory(model: ModelConfig, plan: Plan) -> DraftMemory:
    """Of a model under its own plan: linear in rows, and in rows times positions."""

    def held(rows: int, positions: int) -> int:
        return account(model, plan, batch_rows=rows, positions=positions).accelerator_bytes

    fixed = held(0, 0)
    return DraftMemory(fixed=fixed, row=held(1, 0) - fixed, position=held(1, 1) - held(1, 0))


DRAFT = ModelDraftDescription()
