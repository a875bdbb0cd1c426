"""The fields of a plan: one table, from which the checks, the flags of the scripts, their help and the reading of JSON derive."""

import dataclasses
import typing
from typing import Any, Literal

from specmoe_jax.config.field_info import PROBABILITY, FieldSpec, Needs, field, table_of
from specmoe_jax.config.registry import (
    DRAFT_SETS,
    DRAFT_STOPS,
    DRAFTS,
    EXPERT_FLOWS,
    HOST_CACHE_POLICIES,
    KV_TIERS,
    PLACEMENTS,
    RETAIN_POLICIES,
)

MAX_TREE = 64  # nodes of one attention call with a tree mask, see ops.attention

Substitution = Literal["affinity", "distinct", "random", "mask"]
Prefetch = Literal["none", "draft", "oracle"]
ExpertTier = Literal["host", "disk"]
PrefillAttention = Literal["cpu", "accelerator"]
Dtype = Literal["float32", "bfloat16"]
Quantised = Literal["int8", "int4"]
ExpertDtype = Literal["int8", "int4", "decoded"]
DenseDtype = Literal["int8", "int4"]

SUBSTITUTIONS: tuple[str, ...] = typing.get_args(Substitution)
EXPERT_TIERS: tuple[str, ...] = typing.get_args(ExpertTier)
PREFILL_ATTENTIONS: tuple[str, ...] = typing.get_args(PrefillAttention)
DTYPES: tuple[str, ...] = typing.get_args(Dtype)
EXPERT_DTYPES: tuple[str, ...] = typing.get_args(ExpertDtype)
DENSE_DTYPES: tuple[str, ...] = typing.get_args(DenseDtype)
QUANTISED: tuple[str, ...] = typing.get_args(Quantised)
DECODED = "decoded"  # of these: not quantised by the plan, and unpacked where the checkpoint is

# The choices that give other fields a meaning.
SPARE = Needs(lambda plan: plan.prefetch == "draft" or plan.retain, "with prefetch={plan.prefetch} and without retain")
STREAM = Needs(lambda plan: plan.flow.streams_layers, "with expert_flow={plan.expert_flow}")
MOVING = Needs(lambda plan: not plan.flow.all_resident, "where every expert is resident")
RETAIN = Needs(lambda plan: plan.retain, "without retain")
SEVERAL = Needs(lambda plan: plan.devices > 1, "on one device")
KEPT = Needs(
    lambda plan: plan.flow.keeps_experts, "with expert_flow={plan.expert_flow}, which gives every device as much as any other"
)
DISK = Needs(lambda plan: plan.expert_tier == "disk", "where every expert is in host memory")
FETCHED = Needs(lambda plan: plan.flow.keeps_experts, "with expert_flow={plan.expert_flow}")
IN_HOST_MEMORY = Needs(lambda plan: plan.expert_tier == "host", "with expert_tier={plan.expert_tier}")
ONE_DEVICE = Needs(lambda plan: plan.devices == 1, "with devices={plan.devices}")


@dataclasses.dataclass(frozen=True)
class PlanFields:
    """A field is None exactly when it has no meaning under the other choices, or when its `none` says what it stands for."""

    preset: str = field(dataclasses.MISSING, "The preset that the plan began as.", flag=None)
    draft: str = field(
        "none",
        "What drafts: hot experts of the model itself (self), merged ones, an EAGLE head, the layer that the model ships for "
        "further tokens (mtp), prompt lookup (ngram), another model, or a draft given to Engine (custom).",
        choices=DRAFTS,
    )
    draft_length: int | None = field(None, "Tokens drafted per step; the depth of a tree.", unit="tokens", by_draft=True)
    draft_experts: int | tuple[int, ...] | None = field(
        None,
        "Draft experts per layer: hot (draft=self), merged (draft=merged), or hot ones of the layer for further tokens, which else "
        "has all of its own (draft=mtp).",
        by_draft=True,
    )
    draft_tree_top_k: int | None = field(None, "Branches of a drafted node (draft=eagle or mtp).", none="a chain", by_draft=True)
    draft_tree_tokens: int | None = field(
        None, "Nodes of the tree to verify, the best of it; draft_length is its depth.", none="a chain", by_draft=True
    )
    draft_kv_bytes: float | None = field(
        None,
        "Accelerator memory of an EAGLE draft's cache when streaming; the rest of it is in host memory.",
        none="all of it",
        unit="bytes",
        by_draft=True,
        flag="draft_kv_gib",
    )
    draft_expert_dtype: Quantised | None = field(
        None,
        "Quantise the experts of the layer for further tokens (draft=mtp).",
        none="not quantised",
        by_draft=True,
    )
    draft_set: str | None = field(
        None, "Which experts stay and draft (draft=self).", none="hot_temporal", choices=DRAFT_SETS, by_draft=True
    )
    substitution: Substitution | None = field(
        None, "What stands in for an absent expert while drafting (draft=self).", none="affinity", by_draft=True
    )
    draft_top_k: int | None = field(
        None,
        "Experts that a drafted token runs, the best of those it chooses that are resident, then substitutes (draft=self).",
        none="all that it chooses",
        by_draft=True,
    )
    merge_every: int | None = field(
        None,
        "Steps from one merge of the experts to the next, by what the verifications chose since (draft=merged).",
        none="merged once, by the first prompts",
        lower=0,
        by_draft=True,
    )
    merge_experts: int | None = field(
        None, "Most used experts of a layer that merge_every averages.", none="twice draft_experts", by_draft=True
    )
    draft_stop: str | None = field(
        None,
        "Ends each row's draft where a token earns less than the step does for the experts that it brings over the link (union). "
        "Rows that sample verify all, unless deterministic_sampling.",
        none="every row verifies draft_length tokens",
        choices=DRAFT_STOPS,
        by_draft=True,
    )
    guard: bool = field(False, "Adapt the draft length while running, down to 0 where it does not pay.", by_draft=True)
    cached_experts: int | tuple[int, ...] | None = field(
        None, "Most used experts kept per layer, without a self-draft (MoE-Caching).", needs=(MOVING,)
    )
    prefetch: Prefetch = field(
        "none",
        "What is fetched while the link is idle: what the draft's gates chose, or what will be needed (oracle, with "
        "an emulated link_bytes_per_s).",
    )
    spare_slots: int | None = field(
        None,
        "Slots beside those that a pass needs, for prefetch=draft and for retained experts.",
        none="with prefetch=draft as many as one layer's dispatch",
        needs=(SPARE,),
        flag=None,
    )
    retain: bool = field(False, "Freed experts stay usable until their slot is overwritten.", needs=(MOVING,))
    retain_policy: str | None = field(
        None,
        "Which retained experts are overwritten last: the most used lately (usage), before them what the draft says that the pass "
        "still needs (drafted), or as a cache of that name.",
        none="usage",
        choices=RETAIN_POLICIES,
        needs=(RETAIN,),
    )
    expert_flow: str = field(
        "on_demand", "How experts come to the accelerator; host_compute: they do not, it is the CPU.", choices=EXPERT_FLOWS
    )
    host_share: float | None = field(
        None,
        "Of the experts that a step needs and the accelerator lacks, the share that the host's cores compute where they lie while "
        "the link brings the others; 1: none crosses for a step, but for those that are kept.",
        none="all cross the link",
        unit=PROBABILITY,
        needs=(FETCHED, IN_HOST_MEMORY, ONE_DEVICE),
    )
    expert_tier: ExpertTier = field("host", "Where all experts are; disk needs host_memory_bytes, which cache some of them.")
    dram_policy: str | None = field(
        None,
        "Which experts host memory caches (expert_tier=disk).",
        none="mru where experts stream, else expected",
        choices=HOST_CACHE_POLICIES,
        needs=(DISK,),
    )
    bypass_page_cache: bool = field(False, "Read from the disk itself (expert_tier=disk), for measurements.", needs=(DISK,))
    kv_tier: str = field("accelerator", "Where the KV cache is and attention runs.", choices=KV_TIERS)
    devices: int = field(1, "Accelerators that share the experts, each over a link of its own (placement).")
    num_processes: int = field(
        1,
        "Processes, one on each host, that have the devices between them, as many each: each loads the experts of its own alone.",
    )
    placement: str | None = field(
        None,
        "Whose expert is whose: expert e is of device e mod n (modulo), or popular ones are spread, so that no link brings much "
        "more than another (popularity).",
        none="modulo",
        choices=PLACEMENTS,
        needs=(SEVERAL, KEPT),
    )
    batch_size: int = field(16, "Requests that generate together.")
    micro_batches: int = field(1, "Parts of a batch in flight at once when streaming.", needs=(STREAM,))
    layer_buffers: int = field(
        2, "Whole layers of experts on the accelerator when streaming; more keep the link busy while drafting.", needs=(STREAM,)
    )
    pinned_layers: int | None = field(
        None,
        "Layers whose experts never cross again when streaming.",
        none="what device_memory_bytes has room for",
        lower=0,
        needs=(STREAM,),
    )
    prefill_chunk: int = field(
        64,
        "Prompt positions that a program takes of each row. Experts cross once for all of a prompt's, but for pools with fewer "
        "free slots than a layer has experts.",
    )
    prefill_attention: PrefillAttention | None = field(
        None, "Where prompts attend when streaming.", none="the accelerator if there is one", needs=(STREAM,)
    )
    deterministic_sampling: bool = field(
        False, "Draws depend on seed, request and position alone: the same text with any plan, with or without speculation."
    )
    dtype: Dtype = field("float32", "Compute and weight type; exactness holds in float32.", flag=None)
    expert_dtype: ExpertDtype | None = field(
        None,
        "Quantise the experts (int8, int4): fewer bytes on the link, other tokens (the error is printed); or decode those of a "
        "quantised checkpoint, which otherwise stay packed (decoded).",
        none="the checkpoint's",
    )
    dense_dtype: DenseDtype | None = field(
        None,
        "Quantise all matrices but experts, routers and embeddings (int8, int4): other tokens (the error is printed).",
        none="the plan's dtype",
    )
    device_memory_bytes: float | None = field(
        None, "Memory to use of each accelerator.", none="what the plan can use", unit="bytes", flag="device_memory_gib"
    )
    host_memory_bytes: float | None = field(
        None, "Host memory to use.", none="what the machine has", unit="bytes", flag="host_memory_gib"
    )
    link_bytes_per_s: float | None = field(
        None,
        "Emulate a slower link (stamped on the figures).",
        none="the real one",
        unit="bytes/s",
        needs=(MOVING,),
        flag="link_gbps",
    )
    synthetic_acceptance: float | None = field(
        None,
        "Accept each drafted token with this probability; the text is meaningless.",
        unit=PROBABILITY,
        by_draft=True,
        flag=None,
    )

    @property
    def flow(self) -> Any:
        """A planner.flows.protocol.ExpertFlowDescription: how experts come to the accelerator. Raises PlanError if unknown."""
        return EXPERT_FLOWS.description(self.expert_flow)

    @property
    def cache_tier(self) -> Any:
        """Where the KV cache is: a kv_cache.tiers.KvTierDescription. Raises PlanError for an unknown one."""
        return KV_TIERS.description(self.kv_tier)

    @property
    def drafting(self) -> Any:
        """What drafts: a planner.drafts.protocol.DraftDescription. Raises PlanError for an unknown one."""
        return DRAFTS.description(self.draft)

    @property
    def retaining(self) -> Any:
        """Which retained experts go first: an offload.retain_policies.RetainPolicy. Raises PlanError for an unknown one."""
        return RETAIN_POLICIES.description(self.retain_policy or "usage")

    @property
    def placing(self) -> Any:
        """Whose expert is whose: an offload.homes.Placement. Raises PlanError for an unknown one."""
        return PLACEMENTS.description(self.placement or "modulo")

    @property
    def stopping(self) -> Any:
        """What ends the rows' drafts: a speculate.row_lengths.DraftStop; None for nothing. Raises PlanError for an unknown one."""
        return None if self.draft_stop is None else DRAFT_STOPS.description(self.draft_stop)

    @property
    def foresees(self) -> bool:
        """Whether anything looks at the experts that the draft's gates chose."""
        return self.prefetch == "draft" or self.draft_stop is not None or self.retaining.by_draft

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


def fields_of_a_plan() -> dict[str, FieldSpec]:
    """The table, by name."""
    return table_of(PlanFields)


def most(value: int | tuple[int, ...]) -> int:
    """The largest number of a field that may differ by layer."""
    return max(value) if isinstance(value, tuple) else value
