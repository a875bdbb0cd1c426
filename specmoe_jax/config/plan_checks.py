"""The checks of a plan: of the values of its fields, and that each has an effect under the others."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_fields import DECODED, PlanFields, fields_of_a_plan, most
from specmoe_jax.support.errors import PlanError


def check_plan(plan: PlanFields, config: ModelConfig) -> None:
    """Raises PlanError naming the field, its value and what would work."""
    check_values(plan)
    _check_model(plan, config)
    plan.drafting.check(plan, config)
    _check_effects(plan)
    _check_combinations(plan, config)
    plan.flow.check(plan, config)


def check_values(plan: PlanFields) -> None:
    """Every field is of its type, one of its choices and in its range. Raises PlanError."""
    for name, spec in fields_of_a_plan().items():
        if not spec.accepts(getattr(plan, name)):
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be {spec.expected}")


def _check_effects(plan: PlanFields) -> None:
    """No field has a value of its own where the choices that give it a meaning are missing."""
    for name, spec in fields_of_a_plan().items():
        value = getattr(plan, name)
        for need in spec.info.needs:
            if value != spec.default and not need.condition(plan):
                advice = f"leave it {spec.default}" if spec.default else "leave it out"
                raise PlanError(f"{name}={value} has no effect {need.without.format(plan=plan)}; {advice}")


def _check_model(plan: PlanFields, config: ModelConfig) -> None:
    """Values that the model limits."""
    for name, spec in fields_of_a_plan().items():
        value = getattr(plan, name)
        if spec.per_layer and isinstance(value, tuple) and len(value) != config.num_moe_layers:
            raise PlanError(f"{name} has {len(value)} numbers; the model has {config.num_moe_layers} layers with experts")
    if plan.cached_experts is not None and most(plan.cached_experts) > config.num_experts:
        raise PlanError(f"cached_experts is {plan.cached_experts}; a layer has {config.num_experts} experts")


def _check_combinations(plan: PlanFields, config: ModelConfig) -> None:
    """Choices that do not go together."""
    if plan.substitution == "distinct" and config.experts_per_token == 1:
        raise PlanError("substitution=distinct has no effect where a token chooses one expert; leave it out")
    if plan.expert_dtype not in (None, DECODED) and plan.expert_tier == "disk":
        raise PlanError(
            f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without expert_tier=disk; leave one out"
        )
    if plan.retaining.by_draft and not plan.drafting.gated:
        raise PlanError(
            f"retain_policy={plan.retain_policy} ranks by what a draft's gates choose, and draft={plan.draft} runs none of the "
            "model's; use draft=self or merged, or another retain_policy"
        )
    if plan.num_processes > 1:
        _check_processes(plan)
    if plan.devices > 1:
        _check_devices(plan, config)
    if plan.prefetch == "oracle" and plan.link_bytes_per_s is None:
        raise PlanError("prefetch=oracle knows the future, which only an emulated link can; give link_bytes_per_s")
    if plan.expert_tier == "disk" and plan.host_memory_bytes is None:
        raise PlanError("expert_tier=disk needs the host memory to cache experts in; give host_memory_bytes")


def _check_devices(plan: PlanFields, config: ModelConfig) -> None:
    """What is built for experts that several devices hold."""
    if plan.devices > config.num_experts:
        raise PlanError(f"devices={plan.devices} of a layer with {config.num_experts} experts; give at most one for each")
    if not plan.flow.several_devices:
        raise PlanError(f"expert_flow={plan.flow.name} is built for one device; got devices={plan.devices}, leave it 1")
    if not plan.drafting.several_devices:
        raise PlanError(f"draft={plan.drafting.name} is built for one device; got devices={plan.devices}, leave it 1")


def _check_processes(plan: PlanFields) -> None:
    """What is built for experts that several processes hold."""
    if plan.devices % plan.num_processes:
        raise PlanError(f"devices={plan.devices} of num_processes={plan.num_processes}; give a multiple, as many to each")
    if plan.expert_dtype not in (None, DECODED):
        raise PlanError(
            f"expert_dtype={plan.expert_dtype} packs all experts in each of num_processes={plan.num_processes}; leave it out"
        )
    if plan.prefetch == "draft" and plan.expert_tier == "disk":
        raise PlanError(
            f"prefetch=draft looks at what a disk has read by now, which num_processes={plan.num_processes} see differently; use "
            "expert_tier=host or prefetch=none"
        )
