"""An EAGLE draft whose cache is in pages on the accelerator and in host memory (SpecMoEOff 4): executes drafts.draft_split.

The dense products of all rows run on the accelerator, a row's attention where its cache is, in the CPU's lane at the same time as
there. In host memory a row's pages are those that it has of the target's cache, as if the head were one more layer.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.context import DeviceContext
from specmoe_jax.engine.runtime import Runtime, empty_pages
from specmoe_jax.engine.state import HostKV, State
from specmoe_jax.kv_cache.page_table import Pages, grow, no_pages, release
from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.network import EagleHead, Projected
from specmoe_jax.offload.stream_schedule import CPU
from specmoe_jax.ops import PackedCache, packed
from specmoe_jax.speculate.drafts.draft_split import DraftSplit, no_split, plan_draft_split
from specmoe_jax.speculate.drafts.eagle import draft_chain, head_logits, known, remember
from specmoe_jax.speculate.drafts.grown_tree import TreeShape, branch, forest, harvest, sprout
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.support.processes import put
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import KVCache, Proposal, Tree

Sides = tuple[jax.Array, jax.Array]  # what each side attended [b, T, H, D]: zeros for the rows of the other one


class SplitMemory(NamedTuple):
    """here, there: pages on the accelerator and in host memory. pages: the page table of the accelerator's.

    host_table: [B, P], those of the host. feature: [B, M], see speculate.drafts.eagle.EagleMemory.
    """

    here: PackedCache
    there: PackedCache
    pages: Pages
    host_table: np.ndarray
    split: DraftSplit
    feature: jax.Array


@dataclasses.dataclass(frozen=True)
class SplitDraft:
    """EagleDraft (drafts.eagle) with its cache in two places. pages: of the accelerator. host_pages: as many as the target
    has. lookahead: of the plan."""

    head: EagleHead
    tree: TreeShape | None
    context: DeviceContext
    lookahead: int
    pages: int
    host_pages: int

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.head.config.feature_layers

    def new_memory(self, rows: int, positions: int) -> SplitMemory:
        attention, dtype = self.head.config.layer.attention, self.head.weights.fc.dtype
        pages = no_pages(rows, positions, self.pages)
        return SplitMemory(
            here=empty_pages(attention, self.pages, dtype, self.context.place),
            there=empty_pages(attention, self.host_pages, dtype, self.context.host),
            pages=pages,
            host_table=pages.table,
            split=no_split(rows),
            feature=jnp.zeros((rows, self.head.config.hidden_size), dtype, device=self.context.place),
        )

    def place(self, memory: SplitMemory, state: State[HostKV]) -> tuple[SplitMemory, int]:
        """The cache of every row that runs where it should be in the coming step, with room for it; and how many were moved."""
        runs = state.active | state.joining
        requests = np.array([r.id if r and run else -1 for r, run in zip(state.requests, runs, strict=True)], np.int64)
        prompts = np.array([len(r.token_ids) if r else 0 for r in state.requests])
        limits = np.array([r.limit if r else 0 for r in state.requests])
        lookahead = self.lookahead
        tokens = np.where(runs, np.where(state.joining, prompts - 1, state.lengths) + lookahead, 0)
        most = np.where(runs, prompts + limits + lookahead, 0)
        pages, table = memory.pages, state.kv.pages.table
        ways = plan_draft_split(memory.split, requests, pages_of(tokens), pages_of(most), len(pages.free))
        here, there = memory.here, memory.there
        for row in np.flatnonzero((requests != memory.split.requests) & (pages.table[:, 0] >= 0)).tolist():
            pages = release(pages, row)
        for row in ways.out:
            there = self._copied(here, there, pages.table[row], table[row], state.lengths[row])
            pages = release(pages, row)
        for row in ways.back:
            pages = _grown(pages, row, tokens[row])
            here = self._copied(there, here, table[row], pages.table[row], state.lengths[row])
        if not runs.any():  # so that both ways are compiled
            nobody = np.full(table.shape[1], -1, np.int32)
            there = self._copied(here, there, nobody, nobody, 0)
            here = self._copied(there, here, nobody, nobody, 0)
        for row in np.flatnonzero(runs & ~ways.split.on_cpu).tolist():
            pages = _grown(pages, row, tokens[row])
        moved = memory._replace(here=here, there=there, pages=pages, host_table=table, split=ways.split)
        return moved, len(ways.out) + len(ways.back)

    def _copied(self, source: PackedCache, target: PackedCache, of: np.ndarray, to: np.ndarray, positions: int) -> PackedCache:
        """target, consumed, with a row's pages of the source."""
        used = np.arange(len(of)) < pages_of(positions)
        values = _take(source, np.where(used, of, -1))
        self.context.activations.send(values.num_bytes)
        return _put(target, np.where(used, to, -1), put(values, target.v.device))

    def observe(self, memory: SplitMemory, rows, following, features, lengths, num_new) -> SplitMemory:
        projected = _project_observed(self.head, following, features, lengths)
        memory, attended = self._attend(memory, projected, rows, lengths, num_new)
        return memory._replace(feature=_remembered(self.head, memory.feature, projected.h, attended, rows, num_new))

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        memory, rows = view.memory, np.arange(len(view.lengths), dtype=np.int32)
        feature, num_new = known(memory.feature, view.lengths), view.active.astype(np.int32)
        if self.tree is not None:
            growing = _sprout(self.head, self.tree, feature)
            for generation in range(1, view.length):
                projected, tree = _project_generation(self.head, generation, growing, view.lengths)
                count = num_new * np.int32(projected.k.shape[1])
                memory, attended = self._attend(memory, projected, rows, view.lengths, count, tree)
                growing = _branch(self.head, self.tree, generation, growing, projected, attended)
            tokens, tree = _harvest(self.tree, view.length, growing)
            return Proposal(tokens=tokens, probs=None, memory=memory, tree=tree), view.kv

        def advance(token, feature, at):
            nonlocal memory
            projected = _project_next(self.head, token, feature, at)
            memory, attended = self._attend(memory, projected, rows, at, num_new)
            return _advance(self.head, projected.h, attended)

        tokens, probs = draft_chain(head_logits(self.head, feature), view, feature, advance)
        return Proposal(tokens=tokens, probs=probs, memory=memory), view.kv

    def _attend(
        self, memory: SplitMemory, projected: Projected, rows, lengths, num_new, tree: Tree | None = None
    ) -> tuple[SplitMemory, Sides]:
        """Both parts at once. rows: [b] of the batch, -1 for padding.

        -> memory, and what each side attended [b, T, H, D]: zeros for the rows of the other one.
        """
        on_cpu = (rows >= 0) & memory.split.on_cpu[rows]
        here, there = np.where(on_cpu, 0, num_new).astype(np.int32), np.where(on_cpu, num_new, 0).astype(np.int32)
        warms_up, going = not num_new.any(), None
        if warms_up or there.any():
            inputs = self.context.to_host(projected[1:])
            where = put((_rows_of(memory.host_table, rows), lengths, there, tree), self.context.host)
            going = self.context.workers.cpu.submit(self._attend_there, inputs, memory.there, where)
        attended = [jnp.zeros_like(projected.q)] * 2
        if warms_up or here.any():
            layer, table = self.head.config.layer, _rows_of(memory.pages.table, rows)
            attended[0], cache = stages.attend_paged(layer, *projected[1:], None, memory.here, table, lengths, here, tree)
            memory = memory._replace(here=cache)
        if going is not None:
            out, cache = going.result()
            attended[1] = self.context.to_accelerator(out)
            memory = memory._replace(there=cache)
        return memory, (attended[0], attended[1])

    def _attend_there(self, inputs, cache: PackedCache, where) -> tuple[jax.Array, PackedCache]:
        """In the CPU's lane."""
        inputs, where = self.context.on_host(inputs), jax.block_until_ready(where)
        start_s = time.perf_counter()
        done = jax.block_until_ready(stages.attend_paged(self.head.config.layer, *inputs, None, cache, *where))
        if self.context.workers.spans is not None:
            self.context.workers.spans.append(Span("draft attention", CPU, -1, -1, start_s, time.perf_counter()))
        return done


def placed(runtime: Runtime, state: State) -> tuple[State, int]:
    """The state with its draft's cache where the coming step needs it, and the number of rows moved; unchanged for other drafts."""
    if not isinstance(runtime.draft, SplitDraft):
        return state, 0
    memory, moves = runtime.draft.place(state.draft_memory, state)
    return state._replace(draft_memory=memory), moves


def rows_on_cpu(state: State) -> int:
    """Active rows whose draft attends on the CPU."""
    memory = state.draft_memory
    return int((memory.split.on_cpu & state.active).sum()) if isinstance(memory, SplitMemory) else 0


def _grown(pages: Pages, row: int, tokens: int) -> Pages:
    """With pages for `tokens` tokens of a row; the split has left room for them."""
    grown = grow(pages, row, tokens)
    assert grown is not None
    return grown


def _rows_of(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(rows[:, None] < 0, -1, table[rows])


def _sum(attended: Sides) -> jax.Array:
    here, there = attended
    return here + there


_take = jax.jit(packed.take_pages)
_put = jax.jit(packed.put_pages, donate_argnums=0)
_harvest = jax.jit(harvest, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=1)
def _sprout(head: EagleHead, shape: TreeShape, feature):
    return sprout(head.config.layer.attention, shape, eagle.logits(head, feature), feature)


@jax.jit
def _project_observed(head: EagleHead, following, features, lengths) -> Projected:
    feature = eagle.fuse(head, features.astype(head.weights.fc.dtype))
    return eagle.project(head, following, feature, lengths)


@jax.jit
def _project_next(head: EagleHead, token, feature, lengths) -> Projected:
    return eagle.project(head, token[:, None], feature[:, None], lengths)


@functools.partial(jax.jit, static_argnums=1)
def _project_generation(head: EagleHead, generation: int, growing, lengths) -> tuple[Projected, Tree]:
    grown = forest(growing, generation)
    return eagle.project_tree(head, growing.beam, growing.features, grown, lengths), grown.tree


@jax.jit
def _advance(head: EagleHead, h, attended: Sides) -> tuple[jax.Array, jax.Array]:
    """-> logits [B, V], feature [B, M]."""
    feature = eagle.finish(head, h, _sum(attended))[:, 0]
    return eagle.logits(head, feature), feature


@functools.partial(jax.jit, static_argnums=(1, 2))
def _branch(head: EagleHead, shape: TreeShape, generation: int, growing, projected: Projected, attended: Sides):
    outputs = eagle.finish(head, projected.h, _sum(attended))
    return branch(shape, generation, growing, eagle.logits(head, outputs), outputs, projected.k, projected.v)


@functools.partial(jax.jit, donate_argnums=1)
def _remembered(head: EagleHead, feature, h, attended: Sides, rows, num_new) -> jax.Array:
    return remember(feature, eagle.finish(head, h, _sum(attended)), rows, num_new)
