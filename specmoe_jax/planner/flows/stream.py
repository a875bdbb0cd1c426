"""The experts of every layer that is not pinned cross the link once a pass; the KV cache is in host memory (SpecMoEOff)."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.kv_cache.positions import CHUNKS_AHEAD, KV_PAGE, PREFILL_TOKENS, pages_of
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.offload.stream_schedule import RESOURCES, UP, Task, pass_tasks, spread
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import DISK, NETWORK, PEERS, Cost, Load
from specmoe_jax.planner.drafts.search_starts import Axis, SearchStart
from specmoe_jax.planner.flows.protocol import FlowMemory
from specmoe_jax.planner.measured.case import Case, MeasuredPass, layer_work
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.planner.passes import Setting, Timing, add_busy
from specmoe_jax.planner.simulate import naive_seconds, simulate
from specmoe_jax.support.errors import PlanError

STREAM_PIECES = 16  # at most, in which the simulator cuts a layer's experts: what waits on the link waits for one of them
MICRO_BATCHES = (1, 2, 4)  # that the search tries


@dataclasses.dataclass(frozen=True)
class StreamFlowDescription:
    name: str = "stream"
    all_resident: bool = False
    keeps_experts: bool = False
    tells_routing: bool = False
    streams_layers: bool = True
    workers: bool = True
    several_devices: bool = True
    host_cache_policy: str = "mru"  # layers are read in turn, so the most recently used one is needed last

    def check(self, plan: Plan, config: ModelConfig) -> None:
        """Streaming keeps no expert between passes and does not depend on the routing."""
        if config.encoder is not None:
            raise PlanError("expert_flow=stream is built for decoders alone; use on_demand with an encoder-decoder")
        if not plan.cache_tier.on_host:
            raise PlanError(
                f"expert_flow=stream keeps the KV cache in host memory; got kv_tier={plan.cache_tier.name}, give kv_tier=host"
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
            raise PlanError(
                f"micro_batches={plan.micro_batches} of batch_size={plan.batch_size} rows; give at most as many as rows"
            )

    def resolved(self, plan: Plan, *, accelerator_is_cpu: bool) -> Plan:
        """Prompts attend on the accelerator, unless it is the CPU, whose own kernel attends faster."""
        if plan.prefill_attention is not None:
            return plan
        return plan.replace(prefill_attention="cpu" if accelerator_is_cpu else "accelerator")

    def reads_pages(self, plan: Plan) -> bool:
        return False

    def is_measured(self, plan: Plan) -> bool:
        return plan.devices == 1

    def batch_rows(self, plan: Plan, rows: int) -> int:
        """Micro-batches have one shape."""
        return -(-rows // plan.micro_batches) * plan.micro_batches

    def paged_load(self, plan: Plan, sizes: Sequence[tuple[int, int]], rows: int) -> PagedLoad | None:
        """Of any `rows` requests: they take over each other's rows in an order that is not known yet."""
        pages = [pages_of(prompt + new + plan.lookahead) for prompt, new in sizes]
        prompts = [prompt for prompt, _ in sizes]
        return PagedLoad(pages=sum(sorted(pages)[-rows:]), prompt_tokens=sum(sorted(prompts)[-rows:]))

    def running_rows(self, plan: Plan, account: MemoryAccount, tokens: int) -> int:
        """As many as have pages in the cache."""
        return min(plan.batch_size, account.kv_pages // pages_of(tokens + plan.lookahead))

    def memory(self, config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None) -> FlowMemory:
        """Of a device, which holds its own experts of a layer."""
        tokens, own = (
            plan.tokens_per_pass * batch_rows + CHUNKS_AHEAD * PREFILL_TOKENS,
            most_experts(plan.devices, config.num_experts),
        )
        paged = paged or PagedLoad(pages=batch_rows * pages_of(positions), prompt_tokens=batch_rows * positions)
        pinned = plan.pinned_layers or 0
        return FlowMemory(
            pass_tokens=tokens,
            dispatch=min(own, tokens * config.experts_per_token),
            pinned_slots=pinned * own,
            wanted_slots=_layers_held(config, plan, pinned) * own,
            cached_positions=paged.pages * KV_PAGE,
            paged=paged,
            pinned_layers=pinned,
        )

    def moving_experts(self, config: ModelConfig, expert_bytes: int) -> int:
        return 1

    def smallest_slots(self, account: MemoryAccount) -> int:
        """All of its buffers."""
        return account.num_slots

    def what_needs_slots(self, plan: Plan) -> str:
        pinned = f"{plan.pinned_layers} pinned layers and " if plan.pinned_layers else ""
        return f"{pinned}{plan.layer_buffers} layers' experts"

    def fill_budget(self, account: MemoryAccount, config: ModelConfig, plan: Plan) -> MemoryAccount:
        """With whole layers (SpecMoEOff, memory manager: spare memory to a static expert cache).

        Whole layers, because a part of each would need a kernel of two pools, and an expert of every layer is more than a layer
        where there are more layers than experts. Without a budget there is nothing to fill.
        """
        if plan.pinned_layers is not None or plan.device_memory_bytes is None:
            return account
        beside, own = (
            account.accelerator_bytes - account.num_slots * account.slot_bytes,
            most_experts(plan.devices, config.num_experts),
        )
        room = int(plan.device_memory_bytes - beside) // (own * account.slot_bytes)
        pinned = config.num_moe_layers if room >= config.num_moe_layers else room - plan.layer_buffers
        slots = _layers_held(config, plan, pinned) * own
        return account._replace(num_slots=slots, wanted_slots=slots, pinned_slots=pinned * own, pinned_layers=pinned)

    def without_budget(self, plan: Plan) -> Plan:
        return plan.replace(pinned_layers=plan.pinned_layers or 0)

    def crossing_experts(self, config: ModelConfig, plan: Plan, probabilities: tuple[float, ...], tokens: float) -> float:
        return float(config.num_experts)

    def time_pass(self, setting: Setting, draft_s: float) -> Timing:
        """The engine's own list of tasks, simulated."""
        config, plan, hardware = setting.config, setting.plan, setting.hardware
        load = setting.load._replace(rows=setting.load.rows / plan.micro_batches)  # of a micro-batch
        chunks = min(config.num_experts, STREAM_PIECES)
        one, own = setting.account.expert_bytes, most_experts(plan.devices, config.num_experts)
        computed = setting.experts(load)

        @functools.cache
        def cost(kind: str, layer: int) -> list[Cost]:
            """Of a task on the busiest device."""
            task = Task(kind, layer, 0, ())
            if kind == "experts":
                return computed
            return [setting.task_cost(task, load, streamed=own / chunks)]

        @functools.cache
        def seconds(kind: str, layer: int) -> float:
            return sum(map(setting.seconds, cost(kind, layer)))

        alike = [config.layers.index(layer) for layer in config.layers]  # of each layer the first whose tasks cost the same
        pinned = spread(config.moe_layers, setting.account.pinned_layers)
        tasks = pass_tasks(
            _has_experts(config), plan.micro_batches, chunks, plan.layer_buffers, pinned, recurrent=config.recurrent_layers
        )
        head = costs.head(config, setting.load.tokens, setting.dense_itemsize)
        simulation = simulate(
            tasks,
            lambda task: seconds(task.kind, alike[task.layer]),
            draft_s=draft_s + setting.seconds(head) + hardware.sync_s + hardware.step_s,
            accelerator_is_cpu=hardware.accelerator_is_cpu,
            overlap=hardware.overlap,
        )
        everything = [spent for task in tasks for spent in cost(task.kind, alike[task.layer])]
        return Timing(
            iteration_s=simulation.iteration_s,
            draft_s=draft_s,
            busy_s=add_busy(dict.fromkeys((*RESOURCES, DISK, PEERS, NETWORK), 0.0), setting, [*everything, head]),
            link_bytes=float((config.num_moe_layers - len(pinned)) * config.num_experts * one),
            floor_s=costs.bound_seconds([*everything, head], hardware, plan.dtype),
            simulation=simulation,
        )

    def prefill_seconds(self, setting: Setting, prompt_tokens: int) -> float:
        """All prompts go through each layer together. Deviation: a lower estimate, the busiest resource alone."""
        rows, plan = setting.load.rows, setting.plan
        chunks = max(rows * prompt_tokens / PREFILL_TOKENS, 1.0)  # of prompts
        load = Load(min(PREFILL_TOKENS / prompt_tokens, rows), prompt_tokens, prompt_tokens / 2)
        streamed = most_experts(plan.devices, setting.config.num_experts)
        busy: dict[str, float] = dict.fromkeys(RESOURCES, 0.0)
        pinned = spread(setting.config.moe_layers, setting.account.pinned_layers)
        prompts = 1 if plan.prefill_attention == "accelerator" else 0
        has, recurrent = _has_experts(setting.config), setting.config.recurrent_layers
        for task in pass_tasks(has, 1, 1, plan.layer_buffers, pinned, prompts, recurrent):
            spent = setting.experts(load) if task.kind == "experts" else [setting.task_cost(task, load, streamed=streamed)]
            once = task.resource == UP and task.kind == "stream"
            busy[task.resource] += sum(map(setting.seconds, spent)) * (1 if once else chunks)
        return max(busy.values())

    def measured_pass(
        self, config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, accelerator_is_cpu: bool
    ) -> MeasuredPass:
        """The engine's own list of tasks, simulated."""
        pinned = spread(config.moe_layers, case.pinned_layers)
        shape = {"buffers": plan.layer_buffers, "pinned": pinned, "recurrent": config.recurrent_layers}
        tasks = pass_tasks(_has_experts(config), plan.micro_batches, 1, **shape)
        seconds, without = _measured_seconds(config, plan, operators, case, accelerator_is_cpu=accelerator_is_cpu)

        def of(task: Task) -> float:
            return seconds[task.kind] * (without if task.layer in pinned else 1.0)

        done = simulate(tasks, of, draft_s=drafted_s, accelerator_is_cpu=accelerator_is_cpu)
        naive_s = naive_seconds(tasks, of, draft_s=drafted_s, accelerator_is_cpu=accelerator_is_cpu)
        layers = config.num_moe_layers - len(pinned)
        return MeasuredPass(done.iteration_s - drafted_s, naive_s, layers * seconds["stream"], layers * config.num_experts)

    def busy_share(self, requests: int, rows: int, slowest_row_factor: float) -> float:
        """Rows are filled from the queue, so only the last ones end alone."""
        rounds = requests / rows
        return rounds / (max(rounds, 1.0) - 1 + slowest_row_factor)

    def search_starts(self, config: ModelConfig) -> Iterable[SearchStart]:
        axes = (Axis("micro_batches", MICRO_BATCHES),)
        return (SearchStart(preset("streaming", config), axes),)


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


def _layers_held(config: ModelConfig, plan: Plan, pinned_layers: int) -> int:
    """Layers of experts on the accelerator: the pinned ones and the buffers, which nobody needs when all are pinned."""
    return pinned_layers + (plan.layer_buffers if pinned_layers < config.num_moe_layers else 0)


def _has_experts(config: ModelConfig) -> tuple[bool, ...]:
    return tuple(index is not None for index in config.moe_index)


def _measured_seconds(
    config: ModelConfig, plan: Plan, operators: Operators, case: Case, *, accelerator_is_cpu: bool
) -> tuple[dict[str, float], float]:
    """Seconds of a task by kind, and the share of them that a task of a pinned layer takes."""
    count, new, experts = plan.micro_batches, plan.tokens_per_pass, config.num_experts
    work = layer_work(case.rows / count, new, case.context)
    copied_s = operators.seconds("stream", blocks=experts)
    choices = case.rows / count * new * config.experts_per_token
    used = routing.distinct(case.probabilities, case.choosing(new) / count)
    computed = {
        "embed": 0.0,
        "pre_attention": operators.seconds("pre_attention", **work),
        "to_host": 0.0,  # part of the operators that were measured
        "attention": operators.seconds("attend_paged", **work),
        "to_accelerator": 0.0,
        "recur": operators.seconds("attend_paged", **work),  # not measured apart
        "post_attention": operators.seconds("post_attention", **work),
        "experts": operators.seconds("experts", choices=choices, blocks=used),
    }
    computed_s, without = sum(computed.values()), 1.0
    if accelerator_is_cpu:  # nothing overlaps: the micro-batches together take their measured time, the layer's copies included
        layer_s = operators.seconds("streamed_layer", items=count, **{name: count * amount for name, amount in work.items()})
        computed = {kind: second * layer_s / count / computed_s for kind, second in computed.items()}
        without = max(1 - copied_s / layer_s, 0.5)
    else:
        layer_s = operators.seconds("streamed_layer", items=1, **work)
        computed["post_attention"] += max(layer_s - computed_s, 0.0)  # waiting for the workers
    link_s = experts * operators.expert_bytes / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
    return computed | {"stream": max(copied_s, link_s)}, without


FLOW = StreamFlowDescription()
