"""Frozen configurations: the model's sizes, the sampling parameters, the Plan and its presets."""

import dataclasses
import functools
import json
from collections.abc import Callable

from specmoe_jax.errors import PlanError, RequestError
from specmoe_jax.layer_config import AttentionConfig, Embedding, EncoderConfig, ExpertConfig, LayerConfig, Rope, RouterConfig

GIB = 1 << 30

DRAFTS = ("none", "self", "merged", "eagle", "ngram", "model", "custom")
GATED_DRAFTS = ("self", "merged")  # those that run the target's own gates, over fewer experts
TREE_DRAFTS = ("eagle", "custom")  # those that may propose a tree
MAX_TREE = 64  # nodes of one attention call with a tree mask, see ops.attention
DRAFT_SETS = ("hot_temporal", "hot_global", "random", "decay", "accepted")
SUBSTITUTIONS = ("affinity", "distinct", "random", "mask")
PREFETCHES = ("none", "draft", "oracle")
EXPERT_FLOWS = ("resident", "on_demand", "stream")
EXPERT_TIERS = ("host", "disk")
DRAM_POLICIES = ("lru", "frequency")
KV_TIERS = ("accelerator", "host")
PREFILL_ATTENTIONS = ("cpu", "accelerator")
DTYPES = ("float32", "bfloat16")
EXPERT_DTYPES = ("int8", "int4")
PER_LAYER = ("draft_experts", "cached_experts")  # fields of a plan that are one number, or one for each layer with experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and rules of one model, read from its config.json and never assumed (letters: types.py).

    layer_configs: what each layer computes. Left out, all layers are alike and as Mixtral's: plain rotary positions of
    `rope_theta`, `sliding_window`, softmax routing with renormalised weights.
    expert_hidden, num_experts, experts_per_token: of every layer that has experts; they share one pool of slots.
    embedding: None for plain token embeddings. encoder: None for a decoder alone; what is not said of the encoder
    (num_layers, layers, moe_layers) is the decoder's.
    """

    family: str
    vocab_size: int  # V
    hidden_size: int  # M
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    expert_hidden: int  # F
    num_experts: int  # E
    experts_per_token: int  # A
    max_positions: int
    rope_theta: float | None = None
    norm_eps: float
    tie_embeddings: bool
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...]
    query_rank: int | None = None  # of compressed queries (DeepSeek-V2)
    layer_configs: tuple[LayerConfig, ...] | None = None
    embedding: Embedding | None = None
    encoder: EncoderConfig | None = None

    @functools.cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """One config a layer, equal where layers are alike."""
        return self.layer_configs or (_uniform_layer(self),) * self.num_layers

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts. Residency, votes and expert stores count these only, from 0."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.router is not None)

    @functools.cached_property
    def moe_index(self) -> tuple[int | None, ...]:
        """Of each layer its place among those that have experts; None for a dense one."""
        return tuple(self.moe_layers.index(i) if i in self.moe_layers else None for i in range(self.num_layers))

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @functools.cached_property
    def all_layers(self) -> tuple[LayerConfig, ...]:
        """The decoder's, then the encoder's."""
        return self.layers + (self.encoder.layers if self.encoder else ())

    @functools.cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """Those of all layers that have experts: the order of Model.experts, of the tiers below and of residency."""
        return tuple(i for i, layer in enumerate(self.all_layers) if layer.router is not None)

    @property
    def num_expert_layers(self) -> int:
        return len(self.expert_layers)

    @property
    def experts(self) -> ExpertConfig:
        """The expert of every layer that has any."""
        return self.layers[self.moe_layers[0]].experts

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down, F x M each, and the biases where it has some."""
        return self.experts.params


def _uniform_layer(config: ModelConfig) -> LayerConfig:
    return LayerConfig(
        attention=AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            rope=Rope.plain(config.rope_theta, config.head_dim),
            window=config.sliding_window,
        ),
        router=RouterConfig(num_experts=config.num_experts, experts_per_token=config.experts_per_token, renormalise=True),
        experts=ExpertConfig(hidden=config.expert_hidden, model=config.hidden_size),
        norm_eps=config.norm_eps,
    )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Temperature 0 is greedy.

    Raises RequestError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0 = whole vocabulary
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number of at least 1")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise RequestError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or more, and finite")
        if not _is_whole(self.top_k) or not 0 <= self.top_k < 1 << 31:
            raise RequestError(f"top_k is {self.top_k!r}; it must be a whole number, 0 (whole vocabulary) or more")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}; it must be in (0, 1]")
        if not _is_whole(self.seed) or not 0 <= self.seed < 1 << 32:
            raise RequestError(f"seed is {self.seed!r}; it must be a whole number from 0 to {(1 << 32) - 1}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError(f"stop is {self.stop!r}; it must be a tuple of texts of at least one character each")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1.0):
            raise RequestError("top_k and top_p have no effect at temperature 0; set a temperature or leave them out")


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
    dram_policy: str | None = None  # which experts that cache keeps (expert_tier=disk); None: frequency
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
    def tokens_per_pass(self) -> int:
        """T: positions of one verification pass, the draft's tokens and the last committed one."""
        return (self.draft_tree_tokens or self.draft_length or 0) + 1

    @property
    def tree_rows(self) -> int:
        """Rows that growing a tree takes of the draft's cache beyond the committed ones."""
        return ((self.draft_length or 1) - 1) * (self.draft_tree_top_k or 0)

    @property
    def overshoot(self) -> int:
        """Positions that a pass or its draft may write beyond a request's last token."""
        return max(self.tokens_per_pass, self.tree_rows)

    def settled(self, *, shared_cores: bool) -> "Plan":
        """With what it leaves to the machine. shared_cores: the accelerator is the CPU, where its own kernel attends faster."""
        if self.expert_flow != "stream" or self.prefill_attention is not None:
            return self
        return self.replace(prefill_attention="cpu" if shared_cores else "accelerator")

    def validate(self, config: ModelConfig) -> "Plan":
        """Returns itself, or raises PlanError naming the field, its value and what would work."""
        _check_choices(self)
        _check_types(self)
        _check_draft(self, config)
        _check_effects(self, config)
        return self


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """A finite number; JSON and flags also know nan and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def most(value: int | tuple[int, ...]) -> int:
    """The largest number of a field that may differ by layer."""
    return max(value) if isinstance(value, tuple) else value


def field_names() -> list[str]:
    """Names of the fields of a plan, for messages."""
    return [f.name for f in dataclasses.fields(Plan)]


def _check_choices(plan: Plan) -> None:
    for name, choices in (
        ("draft", DRAFTS),
        ("expert_flow", EXPERT_FLOWS),
        ("expert_tier", EXPERT_TIERS),
        ("dram_policy", (None, *DRAM_POLICIES)),
        ("kv_tier", KV_TIERS),
        ("dtype", DTYPES),
        ("expert_dtype", (None, *EXPERT_DTYPES)),
        ("prefetch", PREFETCHES),
        ("prefill_attention", (None, *PREFILL_ATTENTIONS)),
        ("draft_set", (None, *DRAFT_SETS)),
        ("substitution", (None, *SUBSTITUTIONS)),
    ):
        if getattr(plan, name) not in choices:
            choices = [choice for choice in choices if choice is not None]
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be one of {', '.join(choices)}")


def _check_types(plan: Plan) -> None:
    for name in PER_LAYER:
        value = getattr(plan, name)
        if value is not None and not (isinstance(value, tuple) and value and all(_is_whole(n) and n >= 1 for n in value)):
            if not _is_whole(value) or value < 1:
                raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1, or a tuple of one for each layer")
    for name in (
        "draft_length",
        "draft_tree_top_k",
        "draft_tree_tokens",
        "spare_slots",
        "batch_size",
        "micro_batches",
        "layer_buffers",
        "prefill_chunk",
    ):
        value = getattr(plan, name)
        optional = name not in ("batch_size", "micro_batches", "layer_buffers", "prefill_chunk")
        if not (optional and value is None) and (not _is_whole(value) or value < 1):
            raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1")
    pinned = plan.pinned_layers
    if pinned is not None and (not _is_whole(pinned) or pinned < 0):
        raise PlanError(f"pinned_layers is {pinned!r}; it must be a whole number, 0 or more")
    for name in ("device_memory_bytes", "host_memory_bytes", "draft_kv_bytes", "link_bytes_per_s"):
        value = getattr(plan, name)
        if value is not None and (not _is_number(value) or value <= 0):
            raise PlanError(f"{name} is {value!r}; it must be a finite number above 0")
    for name in ("guard", "bypass_page_cache"):
        if not isinstance(getattr(plan, name), bool):
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be true or false")


def _check_draft(plan: Plan, config: ModelConfig) -> None:
    if plan.draft != "none" and plan.draft_length is None:
        raise PlanError(f"draft={plan.draft} needs a draft_length, for example 4")
    if plan.draft in ("model", "eagle") and config.encoder is not None:
        raise PlanError(f"draft={plan.draft} is built for decoders alone; use self, merged or ngram with an encoder-decoder")
    for name in PER_LAYER:
        value = getattr(plan, name)
        if isinstance(value, tuple) and len(value) != config.num_moe_layers:
            raise PlanError(f"{name} has {len(value)} numbers; the model has {config.num_moe_layers} layers with experts")
    if plan.draft == "merged" and isinstance(plan.draft_experts, tuple):
        raise PlanError(f"draft_experts is {plan.draft_experts}; draft=merged takes one number for all layers")
    if plan.draft in GATED_DRAFTS and (plan.draft_experts is None or most(plan.draft_experts) > config.num_experts):
        raise PlanError(
            f"draft_experts is {plan.draft_experts}; draft={plan.draft} needs 1 to {config.num_experts}, the experts of a layer"
        )
    if plan.cached_experts is not None and most(plan.cached_experts) > config.num_experts:
        raise PlanError(f"cached_experts is {plan.cached_experts}; a layer has {config.num_experts} experts")
    _check_tree(plan, config)
    rate = plan.synthetic_acceptance
    if rate is not None and not (_is_number(rate) and 0 <= rate <= 1):
        raise PlanError(f"synthetic_acceptance is {rate!r}; it must be a probability")


def _check_tree(plan: Plan, config: ModelConfig) -> None:
    """Sizes that the attention kernel takes (a tree mask of 64) and that the tree can have."""
    top_k, tokens = plan.draft_tree_top_k, plan.draft_tree_tokens
    if (top_k is None) != (tokens is None):
        raise PlanError(f"draft_tree_top_k is {top_k} and draft_tree_tokens is {tokens}; give both, or none for a chain")
    if plan.draft not in TREE_DRAFTS or top_k is None or tokens is None:
        return
    largest = min(top_k + (plan.draft_length - 1) * top_k**2, MAX_TREE - 1)
    if plan.tree_rows > MAX_TREE or top_k > config.vocab_size:
        raise PlanError(
            f"draft_tree_top_k is {top_k}; with draft_length={plan.draft_length} at most "
            f"{min(MAX_TREE // max(plan.draft_length - 1, 1), config.vocab_size)} branches can be grown"
        )
    if not plan.draft_length <= tokens <= largest:
        raise PlanError(
            f"draft_tree_tokens is {tokens}; a tree of depth draft_length={plan.draft_length} with {top_k} branches has "
            f"{plan.draft_length} to {largest} nodes to verify"
        )
    if plan.guard:
        raise PlanError("guard=True adapts the length of a chain, not a tree; leave out guard or the draft_tree fields")
    if plan.synthetic_acceptance is not None:
        raise PlanError("synthetic_acceptance is for chains; leave it out or the draft_tree fields")


def _check_effects(plan: Plan, config: ModelConfig) -> None:
    """Each line: fields that need a condition, the condition, and what to do without it."""
    needs = (
        (("draft_length", "guard", "synthetic_acceptance"), plan.draft != "none", "without a draft"),
        (("draft_experts",), plan.draft in GATED_DRAFTS, f"with draft={plan.draft}"),
        (("draft_tree_top_k", "draft_tree_tokens"), plan.draft in TREE_DRAFTS, f"with draft={plan.draft}"),
        (
            ("draft_kv_bytes",),
            plan.draft == "eagle" and plan.expert_flow == "stream",
            f"with draft={plan.draft} and expert_flow={plan.expert_flow}",
        ),
        (("draft_set", "substitution"), plan.draft == "self", f"with draft={plan.draft}"),
        (("cached_experts",), plan.draft != "self", "with draft=self, which keeps its draft experts"),
        (("spare_slots",), plan.prefetch == "draft", f"with prefetch={plan.prefetch}"),
        (("pinned_layers", "prefill_attention"), plan.expert_flow == "stream", f"with expert_flow={plan.expert_flow}"),
        (("dram_policy", "bypass_page_cache"), plan.expert_tier == "disk", "where every expert is in host memory"),
        (("cached_experts", "link_bytes_per_s", "retain"), plan.expert_flow != "resident", "where every expert is resident"),
    )
    for names, condition, where in needs:
        for name in names:
            value = getattr(plan, name)
            if not condition and value is not None and value is not False:
                raise PlanError(f"{name}={value} has no effect {where}; leave it out")
    if plan.draft in GATED_DRAFTS and plan.expert_flow == "resident":
        raise PlanError(f"draft={plan.draft} has no effect with expert_flow=resident, where every expert is at hand; use on_demand")
    if plan.prefetch == "draft" and plan.draft not in GATED_DRAFTS:
        raise PlanError(f"prefetch=draft has no effect with draft={plan.draft}: its gates tell nothing; use draft=self")
    if plan.substitution == "distinct" and config.experts_per_token == 1:
        raise PlanError("substitution=distinct has no effect where a token chooses one expert; leave it out")
    if plan.expert_dtype is not None and (plan.expert_tier == "disk" or plan.draft == "merged"):
        what = "expert_tier=disk" if plan.expert_tier == "disk" else "draft=merged"
        raise PlanError(
            f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without {what}; leave one out"
        )
    if plan.prefetch == "oracle" and plan.link_bytes_per_s is None:
        raise PlanError("prefetch=oracle knows the future, which only an emulated link can; give --link_gbps")
    if plan.expert_tier == "disk" and plan.host_memory_bytes is None:
        raise PlanError("expert_tier=disk needs the host memory to cache experts in; give --host_memory_gib")
    if plan.expert_flow == "stream" and config.encoder is not None:
        raise PlanError("expert_flow=stream is built for decoders alone; use on_demand with an encoder-decoder")
    if plan.expert_flow == "stream":
        _check_stream(plan, config)
    elif plan.micro_batches != 1:
        raise PlanError(f"micro_batches={plan.micro_batches} has no effect with expert_flow={plan.expert_flow}; leave it 1")
    elif plan.layer_buffers != 2:
        raise PlanError(f"layer_buffers={plan.layer_buffers} has no effect with expert_flow={plan.expert_flow}; leave it 2")


def _check_stream(plan: Plan, config: ModelConfig) -> None:
    """Streaming keeps no expert between passes and asks no router what to bring."""
    if plan.kv_tier != "host":
        raise PlanError(f"expert_flow=stream keeps the KV cache in host memory; got kv_tier={plan.kv_tier}, give kv_tier=host")
    if plan.draft in GATED_DRAFTS:
        raise PlanError(
            f"draft={plan.draft} needs experts that stay on the accelerator, expert_flow=stream keeps none; use on_demand"
        )
    if plan.cached_experts is not None or plan.retain or plan.prefetch != "none":
        raise PlanError(
            "cached_experts, retain and prefetch have no effect with expert_flow=stream, which brings every expert; leave them "
            "out, or use pinned_layers"
        )
    if not 2 <= plan.layer_buffers <= max(config.num_moe_layers, 2):
        raise PlanError(
            f"layer_buffers={plan.layer_buffers}; streaming takes 2 to {max(config.num_moe_layers, 2)}, the layers with experts"
        )
    _check_pinned_layers(plan, config)
    if plan.micro_batches > plan.batch_size:
        raise PlanError(f"micro_batches={plan.micro_batches} of batch_size={plan.batch_size} rows; give at most as many as rows")


def _check_pinned_layers(plan: Plan, config: ModelConfig) -> None:
    layers, pinned = config.num_moe_layers, plan.pinned_layers or 0
    if pinned and pinned != layers and pinned + plan.layer_buffers > layers:
        raise PlanError(
            f"pinned_layers={pinned} and {plan.layer_buffers} layer buffers for {layers} layers with experts; give {layers}, which "
            f"takes less, or at most {max(layers - plan.layer_buffers, 0)}"
        )
    for name, plain in (("link_bytes_per_s", None), ("layer_buffers", 2)):
        if pinned == layers and getattr(plan, name) != plain:
            raise PlanError(f"{name}={getattr(plan, name)} has no effect with all {layers} layers pinned; leave it out")


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


PRESETS: dict[str, Callable[[ModelConfig], Plan]] = {
    "resident": _resident,
    "on_demand": _on_demand,
    "overlap": _overlap,
    "caching": _caching,
    "specmoe": _specmoe,
    "streaming": _streaming,
    "specmoeoff": _specmoeoff,
}


def preset(name: str, config: ModelConfig) -> Plan:
    """The plan of a preset for a model. Raises PlanError for an unknown name."""
    if name not in PRESETS:
        raise PlanError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name](config)
