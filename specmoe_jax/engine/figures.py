"""StepInfo -> figures with units. Pure."""

import itertools
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.plan import Plan


class Totals(NamedTuple):
    """Sums over the steps of an engine. Row-steps are counted per active row, so that finished rows do not dilute.

    full_tokens, full_s: of the steps in which every row of the batch was active, so without the tail of a job.
    verified_tokens: positions of the verifying passes, and context: cached positions of their rows, both of active rows.
    foreseen, foreseen_needed: experts of a layer that the draft's gates chose, and those that the pass then needed.
    draft_moves, draft_on_cpu: rows whose draft cache changed sides, and row-steps whose draft attended on the CPU.
    device_link_bytes: of link_bytes, those over the link of each device. accepted_at_least: [N + 1], row-steps in which at least j
    drafted tokens were accepted.
    """

    steps: int = 0
    row_steps: int = 0
    new_tokens: int = 0
    verified_tokens: int = 0
    context: int = 0
    decode_s: float = 0.0
    full_tokens: int = 0
    full_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    device_link_bytes: tuple[int, ...] = ()
    link_bytes: int = 0
    draft_link_bytes: int = 0
    merge_bytes: int = 0
    prefetch_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    activation_bytes: int = 0
    disk_bytes: int = 0
    dram_hits: int = 0
    dram_misses: int = 0
    hits: int = 0
    misses: int = 0
    on_host: int = 0
    foreseen: int = 0
    foreseen_needed: int = 0
    draft_moves: int = 0
    draft_on_cpu: int = 0
    accepted_at_least: tuple[int, ...] = ()


def add_step(totals: Totals, info) -> Totals:
    """Totals with one engine.state.StepInfo added."""
    accepted = info.accepted[info.active]
    longest = max(info.drafted + 1, len(totals.accepted_at_least))
    at_least = tuple(int((accepted >= j).sum()) for j in range(longest))
    before = (*totals.accepted_at_least, *[0] * (longest - len(totals.accepted_at_least)))
    step_s, full = info.step_s, bool(info.active.all())
    foreseen, foreseen_needed = _foreseen(info)
    return totals._replace(
        steps=totals.steps + 1,
        full_tokens=totals.full_tokens + full * int(info.committed.sum()),
        full_s=totals.full_s + full * step_s,
        row_steps=totals.row_steps + int(info.active.sum()),
        new_tokens=totals.new_tokens + int(info.committed.sum()),
        verified_tokens=totals.verified_tokens + _verified(info),
        context=totals.context + info.context,
        decode_s=totals.decode_s + step_s,
        draft_s=totals.draft_s + info.drafting_s,
        verify_s=totals.verify_s + info.verify_s,
        device_link_bytes=tuple((np.array(totals.device_link_bytes or 0) + info.device_link_bytes).tolist()),
        link_bytes=totals.link_bytes + info.link_bytes,
        draft_link_bytes=totals.draft_link_bytes + info.draft_link_bytes,
        merge_bytes=totals.merge_bytes + info.merge_bytes,
        prefetch_bytes=totals.prefetch_bytes + info.prefetch_bytes,
        prefetch_wasted_bytes=totals.prefetch_wasted_bytes + info.prefetch_wasted_bytes,
        activation_bytes=totals.activation_bytes + info.activation_bytes,
        disk_bytes=totals.disk_bytes + info.below.disk_bytes,
        dram_hits=totals.dram_hits + info.below.hits,
        dram_misses=totals.dram_misses + info.below.misses,
        hits=totals.hits + info.verify.hits,
        misses=totals.misses + info.verify.misses,
        on_host=totals.on_host + info.verify.on_host,
        foreseen=totals.foreseen + foreseen,
        foreseen_needed=totals.foreseen_needed + foreseen_needed,
        draft_moves=totals.draft_moves + info.draft_moves,
        draft_on_cpu=totals.draft_on_cpu + info.draft_on_cpu,
        accepted_at_least=tuple(a + b for a, b in zip(before, at_least, strict=True)),
    )


def _verified(info) -> int:
    """Positions of the active rows."""
    if info.row_lengths is None:
        return int(info.active.sum()) * info.positions
    return int((info.row_lengths[info.active] + 1).sum())


def _foreseen(info) -> tuple[int, int]:
    if info.verify.routing is None or not info.predicted.any():
        return 0, 0
    foreseen, needed = info.predicted > 0, np.zeros(info.predicted.shape, bool)
    for chosen, ids in zip(needed, info.verify.routing, strict=True):
        chosen[ids[ids >= 0]] = True
    return int(foreseen.sum()), int((foreseen & needed).sum())


class OnDemand(NamedTuple):
    """What plain decoding of a batch would have fetched.

    needed: [W, L, E] bool; entry w holds the experts that decoding token first + w of every row of the batch needs in
    one OnDemand step. counted: [L], experts of the tokens before `first`, which every row that still runs has behind it; so W
    is how far the rows are apart, not how long they get.
    """

    first: int
    needed: np.ndarray
    counted: np.ndarray

    @property
    def experts(self) -> np.ndarray:
        """[L], fetches of experts so far."""
        return self.counted + self.needed.sum(axis=(0, 2))


def no_on_demand(num_layers: int, num_experts: int) -> OnDemand:
    """Before the first step of a batch."""
    return OnDemand(first=0, needed=np.zeros((0, num_layers, num_experts), bool), counted=np.zeros(num_layers, np.int64))


def add_on_demand(before: OnDemand, info) -> OnDemand:
    """Adds what plain decoding would have needed for the tokens that a step committed.

    Every committed token was routed by the target, so the count is exact, not an estimate.
    """
    routing = info.verify.routing  # [L, B, T, A]
    committed = np.where(info.active, info.committed, 0)
    row, offset = np.nonzero(np.arange(routing.shape[2]) < committed[:, None])
    chosen = routing[:, row, offset]  # [L, tokens, A]
    starts, ends = info.start[info.active], (info.start + committed)[info.active]
    first, end = int(starts.min()), max(int(ends.max()), before.first + len(before.needed))
    past = min(first - before.first, len(before.needed))
    needed = np.zeros((end - first, *before.needed.shape[1:]), bool)
    needed[: len(before.needed) - past] = before.needed[past:]
    needed[(info.start[row] + offset - first)[None, :, None], np.arange(len(chosen))[:, None, None], chosen] = True
    return OnDemand(first=first, needed=needed, counted=before.counted + before.needed[:past].sum(axis=(0, 2)))


def acceptance_by_position(totals: Totals) -> list[float]:
    """Share of row-steps in which drafted token j was accepted (so were all before it), j = 1..N."""
    return [count / totals.row_steps for count in totals.accepted_at_least[1:]] if totals.row_steps else []


def conditional_acceptance(totals: Totals) -> list[float | None]:
    """Share of drafted tokens j accepted where all before them were: n-alpha of the EAGLE papers."""
    counts = totals.accepted_at_least
    return [after / before if before else None for before, after in itertools.pairwise(counts)]


def figures(
    totals: Totals,
    plan: Plan,
    *,
    on_demand_bytes: int | None,
    link_bytes_per_s: float | None,
    model_stamps: tuple[str, ...] = (),
) -> dict:
    """The decode figures, units in the names; unknown is None. model_stamps: `Model.synthetic`."""
    tokens, wall = totals.new_tokens, totals.decode_s
    busiest = max(totals.device_link_bytes, default=0)
    floor_s = busiest / link_bytes_per_s if link_bytes_per_s else None
    return {
        "new_tokens": tokens,
        "steps": totals.steps,
        "decode_s": wall,
        "draft_s": totals.draft_s,
        "verify_s": totals.verify_s,
        "tokens_per_step": tokens / totals.row_steps if totals.row_steps else None,
        "verified_per_step": totals.verified_tokens / totals.row_steps if totals.row_steps else None,
        "decode_tokens_per_s": tokens / wall if wall else None,
        "full_batch_tokens_per_s": totals.full_tokens / totals.full_s if totals.full_s else None,
        "acceptance_by_position": acceptance_by_position(totals),
        "conditional_acceptance_by_position": conditional_acceptance(totals),
        "link_bytes": totals.link_bytes,
        "device_link_bytes": list(totals.device_link_bytes),
        "link_balance": busiest * len(totals.device_link_bytes) / totals.link_bytes if totals.link_bytes else None,
        "link_bytes_per_token": totals.link_bytes / tokens if tokens else None,
        "on_demand_link_bytes_per_token": on_demand_bytes / tokens if tokens and on_demand_bytes is not None else None,
        "draft_link_bytes": totals.draft_link_bytes,
        "merge_link_bytes": totals.merge_bytes,
        "prefetch_bytes": totals.prefetch_bytes,
        "prefetch_wasted_bytes": totals.prefetch_wasted_bytes,
        "activation_link_bytes": totals.activation_bytes,
        "disk_bytes": totals.disk_bytes,
        "disk_bytes_per_token": totals.disk_bytes / tokens if tokens else None,
        "dram_hits": totals.dram_hits,
        "dram_misses": totals.dram_misses,
        "draft_moves": totals.draft_moves,
        "draft_cpu_row_share": totals.draft_on_cpu / totals.row_steps if totals.row_steps else None,
        "expert_hits": totals.hits,
        "expert_misses": totals.misses,
        "host_computed_experts": totals.on_host,
        "foreseen_experts": totals.foreseen,
        "foreseen_needed_experts": totals.foreseen_needed,
        "floor_s": floor_s,
        "fraction_of_floor": floor_s / wall if floor_s and wall else None,
        "binding_resource": "link" if floor_s and wall and floor_s > wall / 2 else None,
        "synthetic": [*model_stamps, *_synthetic(plan)],
    }


def _synthetic(plan: Plan) -> list[str]:
    """The emulated or synthetic inputs of these figures, which are not this machine's or this model's."""
    stamps = {
        "link_bytes_per_s": plan.link_bytes_per_s is not None,
        "synthetic_acceptance": plan.synthetic_acceptance is not None,
        "oracle_prefetch": plan.prefetch == "oracle",
    }
    return [name for name, touched in stamps.items() if touched]
