"""The presets: the systems and baselines of both papers as plans."""

from collections.abc import Callable

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.support.errors import PlanError


def _resident(config: ModelConfig) -> Plan:
    """Every expert on the accelerator: the reference, and the fastest where it fits."""
    return Plan(preset="resident", expert_flow="resident")


def _on_demand(config: ModelConfig) -> Plan:
    """MoE-OnDemand (SpecMoE, baselines): fetch what the router chose, keep nothing."""
    return Plan(preset="on_demand")


def _overlap(config: ModelConfig) -> Plan:
    """MoE-Overlap (SpecMoE, baselines): an oracle that fetches the next layer's experts while this one computes."""
    return Plan(preset="overlap", prefetch="oracle")


def _caching(config: ModelConfig) -> Plan:
    """MoE-Caching (SpecMoE, baselines): the 10 % most used experts of each layer stay (13 of 128)."""
    return Plan(preset="caching", cached_experts=-(-config.num_experts // 10))


def _specmoe(config: ModelConfig) -> Plan:
    """SpecMoE: draft with hot resident experts, verify with coalesced fetches.

    Deviation: the paper's N = 4 is of 128 experts; a quarter of the experts, at least top-k, is a better
    start for small E (papers' own N sweep is flat around its choice).
    """
    experts = max(config.experts_per_token, min(4, config.num_experts), config.num_experts // 32)
    return Plan(preset="specmoe", draft="self", draft_length=4, draft_experts=experts)


def _streaming(config: ModelConfig) -> Plan:
    """SpecMoEOff without speculation, and MoE-Lightning's scheme: host KV cache, CPU attention, every layer streamed."""
    return Plan(preset="streaming", expert_flow="stream", kv_tier="host", batch_size=64)


def _specmoeoff(config: ModelConfig) -> Plan:
    """SpecMoEOff: streaming with an EAGLE draft of five tokens (its Table 3) and two micro-batches in flight.

    Where the CPU is the accelerator too, micro-batches only cost: give micro_batches=1.
    """
    return _streaming(config).replace(preset="specmoeoff", draft="eagle", draft_length=5, micro_batches=2)


class UnknownPreset(PlanError, KeyError):
    """A KeyError too, as of any mapping."""

    __str__ = Exception.__str__  # a KeyError shows the repr of its text


class Presets(dict[str, Callable[[ModelConfig], Plan]]):
    """Presets by name, with an error for an unknown one that lists the names."""

    def __missing__(self, name: str):
        raise UnknownPreset(f"preset is {name!r}; it must be one of {', '.join(self)}")


PRESETS = Presets(
    resident=_resident,
    on_demand=_on_demand,
    overlap=_overlap,
    caching=_caching,
    specmoe=_specmoe,
    streaming=_streaming,
    specmoeoff=_specmoeoff,
)


def preset(name: str, config: ModelConfig) -> Plan:
    """The plan of a preset for a model. Raises PlanError for an unknown name."""
    return PRESETS[name](config)
