"""An EAGLE head as the draft: one dense layer that is fed by the target's features, chains or trees, a cache that may be split."""

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig, Rope
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner import costs
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.drafts.checks import TREE_FIELDS, check_decoder
from specmoe_jax.planner.drafts.protocol import DraftCosts, DraftDescription
from specmoe_jax.planner.drafts.search_starts import LENGTHS, TREE_DEPTHS, Axis, SearchStart, tree
from specmoe_jax.planner.measured.case import Case
from specmoe_jax.planner.measured.operators import Operators, draft_work
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.planner.workload import EAGLE_MIXTRAL
from specmoe_jax.support.errors import PlanError

TABLE_ENTRY_BYTES = 4  # of an EAGLE-3 head's table from its own vocabulary to the target's, int32


class EagleDraftDescription(DraftDescription):
    name = "eagle"
    several_devices = True
    fields = TREE_FIELDS | {"draft_kv_bytes"}
    given = "draft_head"
    splits_cache = True
    assumed_acceptance = EAGLE_MIXTRAL
    is_measured = True

    def check(self, plan: Plan, config: ModelConfig) -> None:
        check_decoder(plan, config)
        super().check(plan, config)
        if plan.draft_kv_bytes is not None and not plan.flow.streams_layers:
            raise PlanError(
                f"draft_kv_bytes={plan.draft_kv_bytes} has no effect with draft=eagle and expert_flow={plan.expert_flow}; "
                "leave it out"
            )

    def memory(self, plan: Plan, config: ModelConfig, *, head: EagleConfig | None = None, model=None) -> DraftMemory:
        """Of a head that is not known: of the usual one."""
        head, itemsize = head or usual_head(config), DTYPE_BYTES[plan.dtype]
        return DraftMemory(
            fixed=_weights(head) * itemsize + TABLE_ENTRY_BYTES * (head.draft_vocab_size or 0),
            row=head.hidden_size * itemsize,
            position=costs.cache_row(head.layer.attention) * itemsize,
            watched=len(head.feature_layers) * config.hidden_size * itemsize,
        )

    def costs(
        self,
        plan: Plan,
        config: ModelConfig,
        load: Load,
        *,
        skew: float,
        head: EagleConfig | None = None,
        cpu_share: float = 0.0,
        **_,
    ) -> DraftCosts:
        """The head reads the pass's committed tokens (padded to all of the pass's), then feeds back its own; an output matrix each.

        Of a tree it feeds back a level of draft_tree_top_k nodes at a time. Of a split cache each part attends over its own rows.
        """
        head, itemsize, length, width = head or usual_head(config), DTYPE_BYTES[plan.dtype], plan.draft_length or 1, _width(plan)
        attention, size, output = head.layer.attention, _weights(head), dense_itemsize(plan.dtype, plan.dense_dtype)
        level = Load(load.rows, width, load.context + length / 2)

        def attend(of: Load, share: float, resource: str = ACCELERATOR) -> Cost:
            return costs.attention(attention, of._replace(rows=of.rows * share), itemsize, resource=resource, programs=0)

        def both(of: Load) -> tuple[Cost, tuple[Cost, ...]]:
            copies = (
                costs.queries_down(attention, of, itemsize),
                costs.attended_up(attention, of, itemsize),
            )  # of all rows: one shape
            return attend(of, 1 - cpu_share), (copies[0], attend(of, cpu_share, CPU), copies[1])

        def whole(of: Load) -> tuple[Cost, ...]:
            return () if cpu_share else (attend(of, 1.0),)

        first = (costs.projections(size, load, itemsize), *whole(load), costs.head(config, load.rows, output))
        further = (costs.projections(size, level, itemsize), *whole(level), costs.head(config, load.rows * width, output))
        return DraftCosts(
            costs=(*first, *(further * (length - 1))),
            split=(both(load), *((both(level),) * (length - 1))) if cpu_share else (),
        )

    def operator(self, *, trees: bool) -> str:
        return "eagle_tree_draft" if trees else "eagle_draft"

    def timed(self, num_experts: int) -> tuple[dict, ...]:
        return ({"draft_length": 2}, {"draft_length": 5}, tree(2), tree(4))

    def layers(self, config: ModelConfig) -> int:
        return 1

    def measured_seconds(self, plan: Plan, config: ModelConfig, operators: Operators, case: Case) -> float:
        length, width = plan.draft_length or 0, case.rows * _width(plan)
        work = draft_work(layers=1, length=length, rows=width, context=case.context)
        if plan.draft_tree_top_k:
            return operators.seconds("eagle_tree_draft", **work)
        return length * operators.seconds("draft_head", rows=case.rows) + operators.seconds("eagle_draft", **work)

    def start(self, config: ModelConfig, flow: SearchStart, *, trees: bool = False) -> SearchStart:
        lengths = tuple(map(tree, TREE_DEPTHS)) if trees else LENGTHS
        first = tree(TREE_DEPTHS[0]) if trees else {"draft_length": LENGTHS[0]}
        paper = {"preset": "specmoeoff"} if flow.plan.flow.streams_layers else {}
        return SearchStart(flow.plan.replace(draft=self.name, **first, **paper), (Axis("draft_length", lengths), *flow.axes))


def usual_head(config: ModelConfig) -> EagleConfig:
    """An EAGLE-1 head in the shape of the published one for Mixtral: the target's attention with a KV head for each query head
    (16 KiB of float16 cache a token there), a dense MLP of 3.5 times its width."""
    heads = max(config.hidden_size // 128, 1)
    layer = config.layers[0]
    head_dim = config.hidden_size // heads
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=head_dim**-0.5, rope=Rope.plain(1e4, head_dim)
    )
    dense = LayerConfig(
        attention=attention, router=None, experts=None, norm_eps=layer.norm_eps, mlp_hidden=config.hidden_size * 7 // 2
    )
    return EagleConfig(layer=dense, hidden_size=config.hidden_size, bias=True)


def _weights(head: EagleConfig) -> int:
    """Numbers."""
    return sum(spec.size for spec in spec_leaves(eagle_config.weight_specs(head)))


def _width(plan: Plan) -> int:
    """Nodes of a level that the head runs at once."""
    return plan.draft_tree_top_k or 1


DRAFT = EagleDraftDescription()
