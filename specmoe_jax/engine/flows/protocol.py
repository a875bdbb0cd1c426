"""What the engine asks of an expert flow and of the KV cache's tier.

The flows are resident.py, host_compute.py, on_demand.py and stream.py; the tiers are in kv_tiers.py. The other modules are
parts of them.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.prepare import BatchShape
from specmoe_jax.engine.scheduler import PromptChunk
from specmoe_jax.engine.scoring.layout import ReadPass, ReadRow
from specmoe_jax.engine.state import Cache, ExpertMemory, PassInfo, PassRouting, Request, State, StepInfo
from specmoe_jax.speculate.drafts.protocol import TokenChoice
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots
from specmoe_jax.types import KVCache, Place, Pool, Routing, Tree

# The runtime and the session hold a flow, so they are parameters of it here: neither module imports the other.
R = TypeVar("R", contravariant=True)
S = TypeVar("S", contravariant=True)


class TargetPass(NamedTuple, Generic[Cache]):
    """h: [B, T, M] after the last layer, None if all rows only joined. counts: [L, E] int64, how often each expert was chosen.

    features: [B, T, M'], what the draft takes of the hidden states; None where it takes nothing. prompts: of a streamed pass,
    the chunks that joined and their features. prompt_states: the chunks and their h [b, T, M]. prompt_routing: the chunks and their
    routing, where it is told.
    """

    h: jax.Array | None
    kv: Cache
    memory: ExpertMemory
    counts: np.ndarray
    info: PassInfo
    features: jax.Array | None = None
    prompts: tuple[tuple[PromptChunk, jax.Array], ...] = ()
    prompt_states: tuple[tuple[PromptChunk, jax.Array], ...] = ()
    prompt_routing: tuple[tuple[PromptChunk, PassRouting], ...] = ()


class Unfinished(NamedTuple):
    """A layer whose experts are in their slots and yet to be computed: the program of the next layer does it first.

    config: of the layer. h: [B, T, M] after its attention. slots: [E]. elsewhere: [n, A, M], what the host's cores computed of it.
    """

    config: LayerConfig
    h: jax.Array
    x: jax.Array
    routing: Routing
    pool: Pool
    slots: np.ndarray
    elsewhere: jax.Array | None = None


class Attended(NamedTuple):
    """A layer before its experts. inputs: [B, T, M], what it was given. x: [n, M], what its experts are."""

    inputs: jax.Array
    h: jax.Array
    x: jax.Array
    routing: Routing | None
    k: jax.Array
    v: jax.Array


class ResidentPass(NamedTuple):
    """h: [B, T, M] after the last layer. inputs: of the layers that a draft watches. routed: by the layers with experts."""

    h: jax.Array
    kv: KVCache
    inputs: dict[int, jax.Array]
    routed: tuple[Routing, ...] = ()


class ReadStates(NamedTuple):
    """h: [b, T, M] after the last layer. inputs: [b, T, M * layers], of the watched layers side by side, None if none is."""

    read_pass: ReadPass
    h: jax.Array
    inputs: jax.Array | None


class Chunk(NamedTuple):
    """A part of all prompts of a batch. tokens: [B, T] at positions lengths[b] + t; rows t >= num_new[b] are padding.

    following: [B, T], the token after each. stands_for: rows that begin alike, of which the chunk computes one alone.
    spreads_row: that row, after the last of such chunks: its cache is copied to all rows.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_new: np.ndarray
    following: np.ndarray
    stands_for: int = 1
    spreads_row: int | None = None


class ExpertFlowExecutor(Protocol[R, S]):
    """How experts come to the accelerator, executed. R: Runtime. S: Session. planner/flows/ has the half before anything runs."""

    def resident_slots(self, config: ModelConfig, devices: int = 1) -> np.ndarray | None:
        """[L, E] int32, the slots of the experts where all stay for good, an encoder's layers last; else None."""
        ...

    def first_memory(self, runtime: R) -> ExpertMemory:
        """Memory on the accelerator with what must always be there."""
        ...

    def run_pass(
        self, runtime: R, state: State, tokens: np.ndarray, num_new: np.ndarray, *, predicted: np.ndarray, tree: Tree | None
    ) -> TargetPass:
        """The exact model over the tokens [B, T] of a step; rows t >= num_new[b] are padding. Consumes the state.

        predicted: [L, E], choices that are expected of this pass (0 = none), worth a prefetch.
        """
        ...

    def init(self, session: S, requests: list[Request], batch_shape: BatchShape) -> State:
        """The state of one batch whose prompts have run, with compiled steps."""
        ...

    def open(self, session: S, batch_shape: BatchShape) -> State:
        """The state of a batch without a request, whose rows `admit` fills."""
        ...

    def admit(
        self, session: S, state: State, waiting: Sequence[Request], batch_shape: BatchShape
    ) -> tuple[State, tuple[Request, ...]]:
        """Gives free rows to waiting requests, the first ones first. -> the state before a step, requests that still wait.

        batch_shape: that the state was opened with.
        """
        ...

    def run(
        self, session: S, requests: list[Request], batch_shape: BatchShape, on_step: Callable[[StepInfo], None] | None
    ) -> Generator[TokenEvent, None, None]:
        """All requests, as many at a time as the batch has rows."""
        ...

    def read(
        self, session: S, rows: Sequence[ReadRow], batch_shape: BatchShape, watched: tuple[int, ...] = ()
    ) -> Iterator[ReadStates]:
        """Reads texts and generates nothing: every pass as soon as it is there. watched: layers whose inputs are told."""
        ...


class PooledFlowExecutor(ExpertFlowExecutor[R, S], Protocol):
    """A flow over a pool of slots, which runs prompts and encoders before the first step."""

    def target_pass(
        self,
        runtime: R,
        memory: ExpertMemory,
        kv: KVCache,
        tokens,
        lengths,
        num_new,
        *,
        earlier: np.ndarray,
        predicted: np.ndarray,
        tree: Tree | None = None,
    ) -> TargetPass[KVCache]:
        """The exact model over tokens [B, T] at positions lengths[b] + t, or + depth in a tree; rows t >= num_new[b] are padding.

        earlier: [L, E], choices of the earlier chunks of the same prefill. predicted: as of run_pass. kv and the memory's pool are
        consumed.
        """
        ...

    def prompt_pass(
        self,
        runtime: R,
        memory: ExpertMemory,
        kv: KVCache,
        chunks: Sequence[Chunk],
        observe: Callable[[Chunk, jax.Array | None, jax.Array, PassRouting | None], object],
        on_positions: Callable[[int], object],
    ) -> tuple[ExpertMemory, KVCache, np.ndarray]:
        """The exact model over prompts. -> memory, kv, and how often each expert [L, E] was chosen.

        observe: called with each chunk, what the draft takes of it, h [B, T, M] after the last layer, and its routing (None where
        the runtime does not tell it). on_positions: with the positions done since the last call.
        """
        ...

    def encoder_experts(
        self, runtime: R, moe: int, memory: ExpertMemory, h: jax.Array, x: jax.Array, routing: Routing
    ) -> tuple[jax.Array, ExpertMemory]:
        """The experts of an encoder's layer over whole sequences. -> h, memory."""
        ...


class KvTierExecutor(Protocol[R]):
    """Where the KV cache is and attention runs. kv_cache/tiers.py has the half before anything runs."""

    def place(self, runtime: R) -> Place:
        """Of the cache."""
        ...

    def beside_cache(self, runtime: R, arrays) -> Any:
        """Arrays of the accelerator for a program over the cache."""
        ...

    def attention(
        self, runtime: R, layer: int, h: jax.Array | Unfinished, kv: KVCache, lengths, num_new, tree: Tree | None = None
    ) -> Attended:
        """Everything of a layer before its experts, after what is left of the layer before it."""
        ...

    def resident_layer(
        self, runtime: R, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None
    ) -> tuple[jax.Array, Routing | None, jax.Array, jax.Array]:
        """A layer that needs no copy of an expert, or has none (slots None). -> h, routing (None without experts), k, v."""
        ...

    def resident_pass(
        self, runtime: R, tokens, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None
    ) -> ResidentPass:
        """All layers, of which none needs a copy. tokens: [B, T]; slots: [L, E]."""
        ...

    def draft_forward(
        self, runtime: R, tokens, kv: KVCache, lengths, num_new, pool, slots: Sequence[DraftSlots]
    ) -> tuple[jax.Array, KVCache, Any]:
        """One token per row [B] through resident experts only.

        -> logits [B, V], kv, and of each layer with experts those [B, A] that the router chose, resident or not.
        """
        ...

    def draft_chain(
        self,
        runtime: R,
        token,
        kv: KVCache,
        lengths,
        num_new,
        pool,
        slots: Sequence[DraftSlots],
        choice: TokenChoice,
        length: int,
    ) -> tuple[jax.Array, jax.Array | None, KVCache, Any]:
        """So many tokens per row, each fed back; see DraftView.chain. token: [B], the last one.

        -> as that, and what the routers chose for each token that was fed, of each layer [B, A]; None unless the plan foresees it.
        """
        ...
