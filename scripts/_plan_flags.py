"""The flags that change single fields of a plan, the same in every script that takes a plan (adopt_module_key_flags)."""

from absl import flags

from specmoe_jax import Plan
from specmoe_jax.config.plan_fields import (
    DRAFT_SETS,
    DRAM_POLICIES,
    EXPERT_DTYPES,
    EXPERT_FLOWS,
    EXPERT_TIERS,
    KV_TIERS,
    PREFETCHES,
    PREFILL_ATTENTIONS,
    SUBSTITUTIONS,
)
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.support.units import GIB

DRAFT = flags.DEFINE_enum(
    "draft",
    None,
    [name for name in DRAFTS if DRAFTS.description(name).given != "draft"],
    "Who drafts: hot experts of the model itself, merged ones, an EAGLE head, prompt lookup, another model. Default: the plan's.",
)
DRAFT_LENGTH = flags.DEFINE_integer("draft_length", None, "Tokens drafted per step.")
TREE_TOP_K = flags.DEFINE_integer("draft_tree_top_k", None, "Branches of a drafted node (draft=eagle); default a chain.")
TREE_TOKENS = flags.DEFINE_integer("draft_tree_tokens", None, "Nodes of the tree to verify; draft_length is its depth.")
DRAFT_EXPERTS = flags.DEFINE_integer("draft_experts", None, "Draft experts per layer: hot (draft=self) or merged (draft=merged).")
DRAFT_SET = flags.DEFINE_enum("draft_set", None, DRAFT_SETS, "Which experts stay and draft (draft=self). Default: hot_temporal.")
SUBSTITUTION = flags.DEFINE_enum(
    "substitution", None, SUBSTITUTIONS, "Who stands in for an absent expert while drafting (draft=self). Default: affinity."
)
CACHED_EXPERTS = flags.DEFINE_integer("cached_experts", None, "Most used experts kept per layer, without a self-draft.")
RETAIN = flags.DEFINE_boolean("retain", False, "Freed experts stay usable until their slot is overwritten.")
DRAFT_KV_GIB = flags.DEFINE_float(
    "draft_kv_gib",
    None,
    "Accelerator memory of an EAGLE draft's cache when streaming; the rest of it is in host memory. Default: all.",
)
GUARD = flags.DEFINE_boolean("guard", False, "Adapt the draft length while running, down to 0 where it does not pay.")
PREFETCH = flags.DEFINE_enum(
    "prefetch",
    None,
    PREFETCHES,
    "What is fetched while the link is idle: what the draft's gates chose, or what will be needed (oracle, with --link_gbps).",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Requests that generate together.")
MICRO_BATCHES = flags.DEFINE_integer("micro_batches", None, "Parts of a batch in flight at once when streaming.")
LAYER_BUFFERS = flags.DEFINE_integer("layer_buffers", None, "Layers of experts on the accelerator when streaming; default 2.")
PINNED_LAYERS = flags.DEFINE_integer(
    "pinned_layers", None, "Layers whose experts never cross again when streaming; default: what --device_memory_gib has room for."
)
PREFILL_ATTENTION = flags.DEFINE_enum(
    "prefill_attention", None, PREFILL_ATTENTIONS, "Where prompts attend when streaming; default: the accelerator if there is one."
)
EXPERT_FLOW = flags.DEFINE_enum("expert_flow", None, EXPERT_FLOWS, "How experts come to the accelerator.")
KV_TIER = flags.DEFINE_enum("kv_tier", None, KV_TIERS, "Where the KV cache is and attention runs. Default: the plan's.")
EXPERT_TIER = flags.DEFINE_enum(
    "expert_tier", None, EXPERT_TIERS, "Where all experts are; disk needs --host_memory_gib. Default: host."
)
DRAM_POLICY = flags.DEFINE_enum(
    "dram_policy",
    None,
    DRAM_POLICIES,
    "Which experts host memory caches (expert_tier=disk). Default: mru where experts stream, else frequency.",
)
BYPASS_PAGE_CACHE = flags.DEFINE_boolean("bypass_page_cache", False, "Read from the disk itself (expert_tier=disk).")
DEVICE_GIB = flags.DEFINE_float("device_memory_gib", None, "Accelerator memory to use. Default: what the plan can use.")
HOST_GIB = flags.DEFINE_float("host_memory_gib", None, "Host memory to use. Default: what the machine has.")
EXPERT_DTYPE = flags.DEFINE_enum(
    "expert_dtype",
    None,
    EXPERT_DTYPES,
    "Quantise the experts: fewer bytes on the link, other tokens (the error is printed).",
)
LINK_GBPS = flags.DEFINE_float("link_gbps", None, "Emulate a link of that many GB/s (stamped on the figures).")
DETERMINISTIC = flags.DEFINE_boolean(
    "deterministic_sampling", False, "Draws depend on seed, request and position alone: same text with any plan."
)

_NAMED = (
    DRAFT,
    DRAFT_LENGTH,
    DRAFT_EXPERTS,
    DRAFT_SET,
    SUBSTITUTION,
    CACHED_EXPERTS,
    TREE_TOP_K,
    TREE_TOKENS,
    PREFETCH,
    BATCH_SIZE,
    MICRO_BATCHES,
    LAYER_BUFFERS,
    PINNED_LAYERS,
    PREFILL_ATTENTION,
    EXPERT_FLOW,
    KV_TIER,
    EXPERT_TIER,
    DRAM_POLICY,
    EXPERT_DTYPE,
)  # as the plan's fields
_SWITCHES = (GUARD, RETAIN, BYPASS_PAGE_CACHE, DETERMINISTIC)


def given() -> dict:
    """The fields of the plan that are given as flags."""
    fields = {flag.name: flag.value for flag in _NAMED} | {flag.name: flag.value or None for flag in _SWITCHES} | budgets()
    fields["link_bytes_per_s"] = None if LINK_GBPS.value is None else LINK_GBPS.value * 1e9
    fields["draft_kv_bytes"] = None if DRAFT_KV_GIB.value is None else DRAFT_KV_GIB.value * GIB
    return {name: value for name, value in fields.items() if value is not None}


def budgets() -> dict:
    """Memory budgets, in bytes, those that are given."""
    values = {"device_memory_bytes": DEVICE_GIB.value, "host_memory_bytes": HOST_GIB.value}
    return {name: value * GIB for name, value in values.items() if value is not None}


def over(plan: Plan, **more) -> Plan:
    """The plan with the flags over it, and with `more` over both. Another draft takes the old one's settings along."""
    draft = None if DRAFT.value is None else DRAFTS.description(DRAFT.value)
    if draft is not None and not draft.gated:
        plan = plan.replace(draft_experts=None, draft_set=None, substitution=None)
    if draft is not None and not draft.drafts:
        plan = plan.replace(draft_length=None)
    return plan.replace(**given() | more)
