"""The pure half of a draft: its checks, memory and costs.

One object for each name of config.registry.DRAFTS.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.drafts.checks import CHAIN_FIELDS, check_fields, check_length, check_tree
from specmoe_jax.planner.drafts.search_starts import LENGTHS, Axis, SearchStart
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.support.errors import PlanError

if TYPE_CHECKING:
    from specmoe_jax.planner.calibration import Acceptance
    from specmoe_jax.planner.measured.case import Case
    from specmoe_jax.planner.measured.operators import Operators

Rate = float | tuple[tuple[int, float], ...]  # as Workload.acceptance


class DraftCosts(NamedTuple):
    """costs: one after the other. syncs: how often the host waits meanwhile.

    split: attentions of a cache that is in two places, each on the accelerator and, at the same time, the chain of the CPU's part.
    """

    costs: tuple[Cost, ...]
    split: tuple[tuple[Cost, tuple[Cost, ...]], ...] = ()
    syncs: int = 1


NOTHING = DraftCosts(costs=(), syncs=0)


class DraftDescription(Protocol):
    """A subclass overrides what differs from a draft of chains that needs no expert, no weights and no cache, as prompt lookup.

    name: in the registry. fields: those of a plan that only some drafts use, and this one does. given: the argument of Engine
    that it needs. gated: it runs the target's own gates over resident experts, so it needs an expert flow that keeps some.
    splits_cache: a part of its cache may be in host memory. several_devices: it runs where experts are on several.
    default_draft_set: the policy if the plan names none.
    assumed_acceptance: if nothing was measured. tried_unmeasured: the planner considers it nevertheless.
    is_measured: its operators are among those that a profile measures, and `measured_seconds` adds them up; else its plans are
    predicted from the rates of the machine.
    """

    name: str
    fields: frozenset[str] = CHAIN_FIELDS
    given: str | None = None
    gated: bool = False
    splits_cache: bool = False
    several_devices: bool = False
    default_draft_set: str = "hot_global"
    assumed_acceptance: Rate = 0.5
    tried_unmeasured: bool = False
    is_measured: bool = False

    @property
    def drafts(self) -> bool:
        """Whether it proposes anything."""
        return "draft_length" in self.fields

    @property
    def proposes_trees(self) -> bool:
        return "draft_tree_tokens" in self.fields

    def check(self, plan: Plan, config: ModelConfig) -> None:
        """Raises PlanError for fields of the plan that contradict the draft, or that it does not use."""
        check_length(plan, self.fields)
        check_tree(plan, config, self.fields)
        check_fields(plan, self.fields)
        if plan.prefetch == "draft" and not self.gated:
            raise PlanError(f"prefetch=draft has no effect with draft={self.name}: its gates tell nothing; use draft=self")

    def pinned_experts(self, plan: Plan) -> int | tuple[int, ...]:
        """Of each layer, those that stay on the accelerator between passes."""
        return plan.cached_experts or 0

    def merged_slots(self, plan: Plan, config: ModelConfig) -> int:
        """Slots of the pool, of all devices together, that hold the draft's own experts for good."""
        return 0

    def memory(
        self, plan: Plan, config: ModelConfig, *, head: EagleConfig | None = None, model: ModelConfig | None = None
    ) -> DraftMemory:
        """Its memory beside the target's. head, model: the configuration of what was given, if known."""
        return DraftMemory()

    def costs(
        self,
        plan: Plan,
        config: ModelConfig,
        load: Load,
        *,
        skew: float,
        head: EagleConfig | None = None,
        model: ModelConfig | None = None,
        cpu_share: float = 0.0,
        hosts: int = 1,
    ) -> DraftCosts:
        """Of `plan.draft_length` tokens for each of `load.rows` sequences, from rates of the machine.

        cpu_share: of the rows, those whose draft attends on the CPU. hosts: that hold the devices. What a draft does on the host is
        in Hardware.step_s.
        """
        return NOTHING

    def measured_seconds(self, plan: Plan, config: ModelConfig, operators: "Operators", case: "Case") -> float:
        """The same, from measured operators. Raises PlanError where there are none."""
        raise PlanError(f"draft={self.name} has no measured operators; predict it from the rates of the machine")

    def operator(self, *, trees: bool) -> str | None:
        """The measured operator of its drafting, one of measured.operators; None without one."""
        return None

    def timed(self, num_experts: int) -> tuple[dict, ...]:
        """Fields of plans whose steps tell what its operator costs, the most telling first; none for a draft without one of its
        own. Drafts of these plans have random weights (DraftExecutor.random_inputs)."""
        return ()

    def layers(self, config: ModelConfig) -> int:
        """Layers that it runs for a token."""
        return 0

    def variants(self, plan: Plan) -> tuple[str, ...]:
        """The names under which a calibration may hold the acceptance of the plan's draft, the most exact one first."""
        return (f"{self.name}_tree", self.name) if plan.draft_tree_top_k else (self.name,)

    def rate(self, found: "Acceptance", plan: Plan, config: ModelConfig, skew: float) -> float:
        """The acceptance under a plan, from that measured under another."""
        return found.rate

    def start(self, config: ModelConfig, flow: SearchStart, *, trees: bool = False) -> SearchStart | None:
        """Where the search starts with this draft under an expert flow; None where they do not go together."""
        first = flow.plan.replace(draft=self.name, draft_length=LENGTHS[0])
        return SearchStart(first, (Axis("draft_length", LENGTHS), *flow.axes))

    def smaller(self, config: ModelConfig) -> dict:
        """Fields of a plan that needs less memory."""
        return {}


def described(variant: str) -> tuple[DraftDescription, bool]:
    """The draft that a calibration or a search names, and whether it is to draft trees: "eagle", "eagle_tree".

    Raises PlanError for an unknown one.
    """
    name = variant.removesuffix("_tree")
    trees = variant not in DRAFTS and name in DRAFTS and DRAFTS.description(name).proposes_trees
    return DRAFTS.description(name if trees else variant), trees


def draft_costs(plan: Plan, config: ModelConfig, load: Load, **known) -> DraftCosts:
    """Of a plan's draft; nothing where it drafts no token. known: as DraftDescription.costs."""
    return plan.drafting.costs(plan, config, load, **known) if plan.draft_length else NOTHING
