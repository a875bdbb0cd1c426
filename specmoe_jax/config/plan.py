"""The plan: which parts of the engine are on, as one frozen configuration."""

import dataclasses
import json
from typing import Any

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_checks import check_plan
from specmoe_jax.config.plan_fields import PER_LAYER
from specmoe_jax.config.registry import EXPERT_FLOWS, KV_TIERS
from specmoe_jax.support.errors import PlanError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parts of the engine are on. Every system and baseline of both papers is a value of it.

    A field is None exactly when it has no meaning under the other choices; giving it a value then is an
    error, not ignored. Raises PlanError from `validate`.
    """

    preset: str
    draft: str = "none"
    draft_length: int | None = None  # N tokens drafted per step
    draft_experts: int | tuple[int, ...] | None = None  # resident per MoE layer: N hot (draft=self; may differ by layer), K merged
    draft_tree_top_k: int | None = None  # branches of a drafted node; draft_length is then the tree's depth
    draft_tree_tokens: int | None = None  # nodes that are verified, the best of the tree; None, as the line above: a chain
    draft_kv_bytes: float | None = (
        None  # accelerator memory of an EAGLE draft's cache (expert_flow=stream); the rest: host; None: all
    )
    draft_set: str | None = None  # which experts those are (draft=self); None: hot_temporal
    substitution: str | None = None  # who stands in for the others (draft=self); None: affinity
    guard: bool = False  # adapt the draft length while running, down to no draft where it does not pay
    cached_experts: int | tuple[int, ...] | None = None  # most used experts kept per MoE layer without a self-draft (MoE-Caching)
    prefetch: str = "none"  # "draft": what the draft's gates chose; "oracle": MoE-Overlap, emulated links only
    spare_slots: int | None = None  # slots for prefetch=draft; None: as many as one layer's dispatch
    retain: bool = False  # freed experts stay usable until their slot is overwritten, the least used first
    expert_flow: str = "on_demand"
    expert_tier: str = "host"  # where all experts are; "disk": host_memory_bytes hold a cache of them
    dram_policy: str | None = None  # which experts that cache keeps (expert_tier=disk); None: mru for streams, else frequency
    bypass_page_cache: bool = False  # expert_tier=disk: every read is one of the disk, so that measurements are honest
    kv_tier: str = "accelerator"
    batch_size: int = 16
    micro_batches: int = 1
    layer_buffers: int = (
        2  # whole layers of experts on the accelerator (expert_flow=stream); more keep the link busy while drafting
    )
    pinned_layers: int | None = (
        None  # layers whose experts never cross again (expert_flow=stream); None: what device_memory_bytes leaves room for
    )
    prefill_chunk: int = 64  # prompt positions per prefill pass
    prefill_attention: str | None = None  # where prompts attend (expert_flow=stream); None: accelerator, unless that is the CPU too
    deterministic_sampling: bool = False  # sampled tokens too are the same with speculation on or off
    dtype: str = "float32"
    expert_dtype: str | None = None  # "int8", "int4": quantised experts, another model than the checkpoint's; None: as they are
    device_memory_bytes: int | None = None  # None: as much as the plan can use
    host_memory_bytes: int | None = None  # None: what the machine has
    link_bytes_per_s: float | None = None  # emulate a slower link; None: the real one
    synthetic_acceptance: float | None = None  # accept each drafted token with this probability; text is meaningless

    def replace(self, /, **changes) -> "Plan":
        """A copy with some fields changed. Unknown names raise PlanError."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise PlanError(f"a plan has no field {', '.join(unknown)}; its fields are {', '.join(field_names())}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads what `to_json` wrote. Raises PlanError for anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"the plan is not JSON ({e}); write one with Plan.to_json or scripts/plan.py") from e
        if not isinstance(fields, dict) or not isinstance(fields.get("preset"), str):
            raise PlanError('the plan is not a JSON object with a "preset"; write one with Plan.to_json')
        fields = {name: tuple(value) if name in PER_LAYER and isinstance(value, list) else value for name, value in fields.items()}
        return Plan(preset=fields.pop("preset")).replace(**fields)

    @property
    def flow(self) -> Any:
        """How experts come to the accelerator: a planner.flows.protocol.ExpertFlow. Raises PlanError for an unknown one."""
        return EXPERT_FLOWS.description(self.expert_flow)

    @property
    def cache_tier(self) -> Any:
        """Where the KV cache is: a kv_cache.tiers.KvTier. Raises PlanError for an unknown one."""
        return KV_TIERS.description(self.kv_tier)

    @property
    def tokens_per_pass(self) -> int:
        """T: positions of one verification pass, the draft's tokens and the last committed one."""
        return (self.draft_tree_tokens or self.draft_length or 0) + 1

    @property
    def tree_rows(self) -> int:
        """Rows that growing a tree takes of the draft's cache beyond the committed ones."""
        return ((self.draft_length or 1) - 1) * (self.draft_tree_top_k or 0)

    @property
    def lookahead(self) -> int:
        """Positions that a pass or its draft may write beyond a request's last token."""
        return max(self.tokens_per_pass, self.tree_rows)

    def resolved(self, *, accelerator_is_cpu: bool) -> "Plan":
        """With what it leaves to the machine. accelerator_is_cpu: the accelerator is the CPU, where its own kernel attends
        faster."""
        if self.expert_flow != "stream" or self.prefill_attention is not None:
            return self
        return self.replace(prefill_attention="cpu" if accelerator_is_cpu else "accelerator")

    def validate(self, config: ModelConfig) -> "Plan":
        """Returns itself, or raises PlanError naming the field, its value and what would work."""
        check_plan(self, config)
        return self


def field_names() -> list[str]:
    """Names of the fields of a plan, for messages."""
    return [f.name for f in dataclasses.fields(Plan)]
