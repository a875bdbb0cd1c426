"""A pass that streams every layer's experts and attends on the CPU (SpecMoEOff, 4.1): executes offload/stream_schedule.py.

Three workers: this thread issues the accelerator's work, one worker runs the CPU attention, one brings the experts. Each task
waits for what its entry in the list says; on a CPU without an accelerator all of them share the cores, and only the link is hidden.
"""

import collections
import concurrent.futures
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.layer_passes import as_arrays, features, fetched
from specmoe_jax.engine.flows.staging import Staging
from specmoe_jax.engine.requests.routing import pass_routing
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scheduler import MicroBatch
from specmoe_jax.engine.state import Buffers, HostKV, PassRouting
from specmoe_jax.offload.homes import whole_slots
from specmoe_jax.offload.stream_schedule import KINDS, Task, pass_tasks
from specmoe_jax.support.processes import put
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import Pool, Routing


class StreamedPass(NamedTuple):
    """h: of each micro-batch [b, T, M] after the last layer. features: of each, what the draft takes; None where it takes nothing.

    Both are still in host memory where the micro-batch is offloaded. routing: of each, by layer, where the runtime tells it.
    """

    h: list[jax.Array]
    features: list[jax.Array | None]
    kv: HostKV
    buffers: Buffers
    routing: tuple[PassRouting, ...] = ()


def stream_pass(runtime: Runtime, buffers: Buffers, kv: HostKV, micro_batches: list[MicroBatch]) -> StreamedPass:
    """The exact model over all micro-batches; the experts of each layer that is not pinned cross the link once.

    Consumes buffers and kv. With spans, the time of each task is recorded; this waits for each of the accelerator's
    tasks, which costs a little of the overlap.
    """
    run = _Run(runtime, buffers, kv, micro_batches)
    moe = tuple(index is not None for index in runtime.config.moe_index)
    shape = {
        "buffers": runtime.plan.layer_buffers,
        "pinned": runtime.experts.pinned_layers,
        "prompts": sum(map(run.attends_chunk, micro_batches)),
        "recurrent": runtime.config.recurrent_layers,
    }
    for task in pass_tasks(moe, len(micro_batches), 1, **shape):
        run.handlers[task.kind](task)
    return run.result()


class _Run:
    """The values that tasks hand on during one pass."""

    def __init__(self, runtime: Runtime, buffers: Buffers, kv: HostKV, micro_batches: list[MicroBatch]):
        self.runtime, self.micro_batches = runtime, micro_batches
        self.caches, self.kv = list(kv.caches), kv
        self.host = [
            put((micro_batch.table, micro_batch.lengths, micro_batch.num_new, micro_batch.tree), runtime.context.host)
            for micro_batch in micro_batches
        ]
        placed = [as_arrays(micro_batch.lengths, micro_batch.num_new) for micro_batch in micro_batches]
        self.lengths, self.num_new = [lengths for lengths, _ in placed], [num_new for _, num_new in placed]
        self.h: list = [None] * len(micro_batches)
        self.inputs: list[dict[int, jax.Array]] = [{} for _ in micro_batches]
        self.projected: dict = {}
        self.attended: dict = {}
        self.staging, self.appended = Staging(kv.staged), []
        self.routed: dict = {}
        self.told: list[list[Routing]] = [[] for _ in micro_batches]
        self.spare, readers, coming, self.cache = buffers
        self.readers = list(readers)
        self.coming = collections.deque(coming)
        self.pinned = dict(zip(runtime.experts.pinned_layers, self.cache, strict=True))
        self.due: concurrent.futures.Future | None = None
        self.current: Pool | None = None
        self.handlers = {kind: getattr(self, f"_{kind}") for kind in KINDS}
        self.every_expert = whole_slots(1, runtime.plan.devices, runtime.config.num_experts)[0]

    def attends_chunk(self, micro_batch: MicroBatch) -> bool:
        """Whether it is a chunk of prompts that attends on the accelerator."""
        return micro_batch.offloaded and self.runtime.plan.prefill_attention == "accelerator"

    def result(self) -> StreamedPass:
        for done in self.appended:
            done.result()
        return StreamedPass(
            h=self.h,
            features=[self._features(micro_batch) for micro_batch in range(len(self.micro_batches))],
            kv=self.kv._replace(caches=tuple(self.caches)),
            buffers=Buffers(spare=self.spare, readers=tuple(self.readers), coming=tuple(self.coming), pinned=self.cache),
            routing=() if self.runtime.routing is None else tuple(map(self._routing, self.told, self.micro_batches)),
        )

    def _routing(self, told: list[Routing], micro_batch: MicroBatch) -> PassRouting:
        return pass_routing(told, micro_batch.tokens.shape, self.runtime.routing)

    def _features(self, micro_batch: int) -> jax.Array | None:
        if not self.runtime.gives_features:
            return None
        inputs = {layer: fetched(h) for layer, h in self.inputs[micro_batch].items()}
        taken = features(self.runtime, self._h(micro_batch), inputs)
        return None if taken is None else self._offloaded(micro_batch, taken)

    def _h(self, micro_batch: int) -> jax.Array:
        """The hidden states of a micro-batch on the accelerator."""
        return fetched(self.h[micro_batch])

    def _keep(self, task: Task, h: jax.Array) -> None:
        """What attends on the accelerator stays there until its layer is done."""
        last = "post_attention" if self.runtime.config.moe_index[task.layer] is None else "experts"
        stays = task.kind != last and self.attends_chunk(self.micro_batches[task.micro_batch])
        self.h[task.micro_batch] = h if stays else self._offloaded(task.micro_batch, h)

    def _offloaded(self, micro_batch: int, h: jax.Array) -> jax.Array:
        return jax.device_put(h, self.runtime.context.pinned_sharding) if self.micro_batches[micro_batch].offloaded else h

    def _note(self, task: Task, start_s: float, outputs) -> None:
        """outputs: waited for only if spans are recorded."""
        spans = self.runtime.context.workers.spans
        if spans is not None:
            jax.block_until_ready(outputs)
            spans.append(Span(task.kind, task.resource, task.layer, task.micro_batch, start_s, time.perf_counter()))

    def _embed(self, task: Task) -> None:
        config, micro_batch = self.runtime.config.embedding, self.micro_batches[task.micro_batch]
        where = (self.lengths[task.micro_batch], micro_batch.tree)
        self._keep(task, stages.embed(config, self.runtime.weights.outer, micro_batch.tokens, *where))

    def _pre_attention(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, weights = self.runtime.config.layers[task.layer], self.runtime.weights.layers[task.layer]
        if task.layer in self.runtime.feature_layers:
            self.inputs[task.micro_batch][task.layer] = self.h[task.micro_batch]
        h = self._h(task.micro_batch)
        if self.attends_chunk(self.micro_batches[task.micro_batch]):
            self._keep(task, h)
        projected = stages.pre_attention(
            config, weights, h, self.lengths[task.micro_batch], self.micro_batches[task.micro_batch].tree
        )
        self.projected[task.micro_batch] = (*projected, weights.sinks)
        self._note(task, start_s, projected)

    def _attend_chunk(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, where = self.runtime.config.layers[task.layer], (self.lengths[task.micro_batch], self.num_new[task.micro_batch])
        self.attended[task.micro_batch] = self.staging.attend(config, self.projected[task.micro_batch], *where)
        self._note(task, start_s, self.attended[task.micro_batch])

    def _store(self, task: Task) -> None:
        _, k, v, _ = self.projected[task.micro_batch]
        self.projected[task.micro_batch] = self.runtime.context.to_host((k, v))

    def _append(self, task: Task) -> None:
        self.appended.append(self.runtime.context.workers.cpu.submit(self._write, task, self.projected.pop(task.micro_batch)))

    def _write(self, task: Task, projected) -> None:
        """In the CPU worker: keys and values of prompts that attended on the accelerator."""
        projected = self.runtime.context.on_host(projected)
        start_s = time.perf_counter()
        config, where = self.runtime.config.layers[task.layer], self.host[task.micro_batch][:3]
        cache = stages.append_paged(config, *projected, self.caches[task.layer], *where)
        self.caches[task.layer] = jax.block_until_ready(cache)
        self._note(task, start_s, cache)

    def _recur(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, weights = self.runtime.config.layers[task.layer], self.runtime.weights.layers[task.layer].recurrent
        *projected, _ = self.projected.pop(task.micro_batch)
        micro_batch, state = self.micro_batches[task.micro_batch], self.caches[task.layer]
        where = (jnp.asarray(micro_batch.rows), self.lengths[task.micro_batch], self.num_new[task.micro_batch], micro_batch.tree)
        self.attended[task.micro_batch], self.caches[task.layer] = stages.recur_rows(config, weights, *projected, state, *where)
        self._note(task, start_s, self.attended[task.micro_batch])

    def _to_host(self, task: Task) -> None:
        self.projected[task.micro_batch] = self.runtime.context.to_host(self.projected[task.micro_batch])

    def _attention(self, task: Task) -> None:
        projected = self.projected.pop(task.micro_batch)
        self.attended[task.micro_batch] = self.runtime.context.workers.cpu.submit(self._attend, task, projected)

    def _attend(self, task: Task, projected) -> jax.Array:
        """In the CPU worker, one at a time and in order, so that a chunk finds the rows of the chunks before it."""
        projected = self.runtime.context.on_host(projected)
        start_s = time.perf_counter()
        config = self.runtime.config.layers[task.layer]
        cache = self.caches[task.layer]
        out, self.caches[task.layer] = jax.block_until_ready(
            stages.attend_paged(config, *projected, cache, *self.host[task.micro_batch])
        )
        self._note(task, start_s, out)
        return out

    def _to_accelerator(self, task: Task) -> None:
        self.attended[task.micro_batch] = self.runtime.context.to_accelerator(self.attended[task.micro_batch].result())

    def _post_attention(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, weights = self.runtime.config.layers[task.layer], self.runtime.weights.layers[task.layer]
        attended, num_new = self.attended.pop(task.micro_batch), self.num_new[task.micro_batch]
        h, *routed = stages.post_attention(config, weights, self._h(task.micro_batch), attended, num_new)
        self.routed[task.micro_batch] = routed
        if self.runtime.routing is not None and routed[1] is not None:
            self.told[task.micro_batch].append(routed[1])
        self._keep(task, h)
        self._note(task, start_s, h)

    def _experts(self, task: Task) -> None:
        pinned = self.pinned.get(task.layer)
        if pinned is None and self.due is not None:  # the first micro-batch of the layer
            self.current, self.due, self.readers = self.due.result(), None, []
        layer = self.current if pinned is None else pinned
        start_s = time.perf_counter()
        x, routing = self.routed.pop(task.micro_batch)
        config = self.runtime.config.layers[task.layer]
        h = stages.experts(config, self._h(task.micro_batch), x, routing, layer, self.every_expert)
        self._keep(task, h)
        self._note(task, start_s, h)
        if pinned is None:
            self.readers.append(self.h[task.micro_batch])
            self.spare = self.current

    def _stream(self, task: Task) -> None:
        assert self.spare is not None
        self.due = self.coming.popleft()
        layer = self.runtime.experts.store.send_for(self.runtime.config.moe_layers.index(task.layer))
        self.coming.append(self.runtime.context.workers.link.submit(self._bring, task, layer, self.spare, tuple(self.readers)))
        self.spare = None

    def _bring(self, task: Task, layer: int, buffer, readers) -> Pool:
        """In the link worker: the layer's experts, once the buffer is no longer read."""
        jax.block_until_ready(readers)
        start_s = time.perf_counter()
        buffer = self.runtime.experts.store.stream(buffer, layer)
        self._note(task, start_s, buffer)
        return buffer
