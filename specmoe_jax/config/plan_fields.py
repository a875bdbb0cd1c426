"""What the fields of a plan may be."""

MAX_TREE = 64  # nodes of one attention call with a tree mask, see ops.attention
DRAFT_SETS = ("hot_temporal", "hot_global", "random", "decay", "accepted")
SUBSTITUTIONS = ("affinity", "distinct", "random", "mask")
PREFETCHES = ("none", "draft", "oracle")
EXPERT_FLOWS = ("resident", "on_demand", "stream")
EXPERT_TIERS = ("host", "disk")
DRAM_POLICIES = ("lru", "mru", "frequency")
KV_TIERS = ("accelerator", "host")
PREFILL_ATTENTIONS = ("cpu", "accelerator")
DTYPES = ("float32", "bfloat16")
EXPERT_DTYPES = ("int8", "int4")
PER_LAYER = ("draft_experts", "cached_experts")  # fields of a plan that are one number, or one for each layer with experts


def most(value: int | tuple[int, ...]) -> int:
    """The largest number of a field that may differ by layer."""
    return max(value) if isinstance(value, tuple) else value
