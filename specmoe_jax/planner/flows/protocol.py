"""The pure half of an expert flow: checks, memory, times and search."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.drafts.search_starts import SearchStart
from specmoe_jax.planner.measured.case import Case, MeasuredPass
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.planner.passes import Setting, Timing


class FlowMemory(NamedTuple):
    """What a flow takes for a batch.

    pass_tokens: of its largest pass. dispatch: experts that one layer may ask for at once. pinned_slots: of experts that stay
    between passes. wanted_slots: with them every dispatch fits at once. cached_positions: of the KV cache. paged: what of that is
    in pages, None for whole rows. pinned_layers: whose experts stay beside a stream. waiting_tokens: of prompts, whose hidden
    states wait in host memory between two layers; those of `paged` not counted.
    """

    pass_tokens: int
    dispatch: int
    pinned_slots: int
    wanted_slots: int
    cached_positions: int
    paged: PagedLoad | None = None
    pinned_layers: int = 0
    waiting_tokens: int = 0


class ExpertFlowDescription(Protocol):
    """How experts come to the accelerator, described. Pure.

    all_resident: every expert stays there. keeps_experts: of each layer some may stay between passes, and the host waits for each
    router and fetches those that are missing. tells_routing: a pass reports its routing, from which follows what plain decoding
    would have fetched. streams_layers: the experts of whole layers cross the link in every pass. workers: a pass runs in worker
    threads beside the engine's own, whose tasks can be traced as spans. several_devices: whether experts may be on several, each
    its own (devices=n). host_cache_policy: which experts a host cache keeps
    (expert_tier=disk) where the plan does not say.
    """

    name: str
    all_resident: bool
    keeps_experts: bool
    tells_routing: bool
    streams_layers: bool
    workers: bool
    several_devices: bool
    host_cache_policy: str

    def check(self, plan: Plan, config: ModelConfig) -> None:
        """Raises PlanError for fields that contradict this flow."""
        ...

    def resolved(self, plan: Plan, *, accelerator_is_cpu: bool) -> Plan:
        """The plan with what it leaves to the machine."""
        ...

    def reads_pages(self, plan: Plan) -> bool:
        """Whether experts are computed from the pages of a mapped checkpoint, of which the system keeps what it can."""
        ...

    def is_measured(self, plan: Plan) -> bool:
        """Whether the operators that autotune measures of this flow are those that the plan runs."""
        ...

    def batch_rows(self, plan: Plan, rows: int) -> int:
        """Rows that a batch of at least `rows` requests is compiled for."""
        ...

    def paged_load(self, plan: Plan, sizes: Sequence[tuple[int, int]], rows: int) -> PagedLoad | None:
        """What `rows` requests fill at most of a paged cache; None without one. sizes: prompt and new tokens of all requests."""
        ...

    def running_rows(self, plan: Plan, account: MemoryAccount, tokens: int) -> int:
        """Sequences that run at a time where each has so many tokens in the end."""
        ...

    def memory(
        self, config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None
    ) -> FlowMemory: ...

    def moving_experts(self, config: ModelConfig, expert_bytes: int) -> int:
        """Experts on their way to an accelerator of its own at a time, beside its slots."""
        ...

    def smallest_slots(self, account: MemoryAccount) -> int:
        """Slots without which nothing runs."""
        ...

    def what_needs_slots(self, plan: Plan) -> str:
        """For messages: the purpose that a budget is too small for."""
        ...

    def fill_budget(self, account: MemoryAccount, config: ModelConfig, plan: Plan) -> MemoryAccount:
        """The account with what else the flow puts into a budget of device memory."""
        ...

    def without_budget(self, plan: Plan) -> Plan:
        """The plan where the device's whole memory takes the place of a budget that was not given: nothing fills it."""
        ...

    def crossing_experts(self, config: ModelConfig, plan: Plan, probabilities: tuple[float, ...], tokens: float) -> float:
        """Experts of a layer that cross the link in a pass."""
        ...

    def time_pass(self, setting: Setting, draft_s: float) -> Timing:
        """An iteration after so much drafting, by rates and efficiencies."""
        ...

    def prefill_seconds(self, setting: Setting, prompt_tokens: int) -> float:
        """The prompts of all rows."""
        ...

    def measured_pass(
        self, config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, accelerator_is_cpu: bool
    ) -> MeasuredPass:
        """A pass after so much drafting, by measured operators."""
        ...

    def busy_share(self, requests: int, rows: int, slowest_row_factor: float) -> float:
        """Share of the tokens/s of a full batch that a whole job reaches: batches may not be full, and rows end early."""
        ...

    def search_starts(self, config: ModelConfig) -> Iterable[SearchStart]:
        """Families of plans."""
        ...
