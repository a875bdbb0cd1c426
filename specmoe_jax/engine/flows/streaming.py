"""A pass that streams every layer's experts and attends on the CPU (SpecMoEOff, 4.1): executes planner.pipeline, nothing more.

Three lanes: this thread issues the accelerator's work, one worker runs the CPU attention, one brings the experts. Each task
waits for what its entry in the list says; on a CPU without an accelerator all of them share the cores, and only the link is hidden.
"""

import collections
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.layer_passes import features, fetched
from specmoe_jax.engine.flows.staging import Staging
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scheduler import Item
from specmoe_jax.engine.state import Buffers, HostKV
from specmoe_jax.offload.stream_schedule import KINDS, Task, pass_tasks
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.support.tracing import Span


class StreamedPass(NamedTuple):
    """h: per item [b, T, M] after the last layer. features: per item, what the draft takes; None where it takes nothing.

    Both are still in host memory where the item is parked.
    """

    h: list[jax.Array]
    features: list[jax.Array | None]
    kv: HostKV
    buffers: Buffers


def stream_pass(runtime: Runtime, buffers: Buffers, kv: HostKV, items: list[Item]) -> StreamedPass:
    """The exact model over all items, the experts of each layer that is not pinned crossing the link once. Consumes buffers and kv.

    With runtime.lanes.spans it is noted when each task ran; this waits for each of the accelerator's tasks, which costs a
    little of the overlap.
    """
    run = _Run(runtime, buffers, kv, items)
    moe = tuple(index is not None for index in runtime.config.moe_index)
    shape = {"buffers": runtime.plan.layer_buffers, "pinned": runtime.pinned_layers, "prompts": sum(map(run.attends_chunk, items))}
    for task in pass_tasks(moe, len(items), 1, **shape):
        run.handlers[task.kind](task)
    return run.result()


class _Run:
    """The values that tasks hand on during one pass."""

    def __init__(self, runtime: Runtime, buffers: Buffers, kv: HostKV, items: list[Item]):
        self.runtime, self.items = runtime, items
        self.caches, self.kv = list(kv.caches), kv
        self.host = [jax.device_put((item.table, item.lengths, item.num_new, item.tree), runtime.host) for item in items]
        self.lengths = [jnp.asarray(item.lengths) for item in items]
        self.num_new = [jnp.asarray(item.num_new) for item in items]
        self.h: list = [None] * len(items)
        self.inputs: list[dict[int, jax.Array]] = [{} for _ in items]
        self.projected: dict = {}
        self.attended: dict = {}
        self.staging, self.appended = Staging(kv.staged), []
        self.routed: dict = {}
        self.spare, self.readers, coming, self.cache = buffers
        self.coming = collections.deque(coming)
        self.pinned = dict(zip(runtime.pinned_layers, self.cache, strict=True))
        self.due = self.current = None
        self.handlers = {kind: getattr(self, f"_{kind}") for kind in KINDS}
        self.every_expert = np.arange(runtime.config.num_experts, dtype=np.int32)

    def attends_chunk(self, item: Item) -> bool:
        """Whether it is a chunk of prompts that attends on the accelerator."""
        return item.offloaded and self.runtime.plan.prefill_attention == "accelerator"

    def result(self) -> StreamedPass:
        for done in self.appended:
            done.result()
        return StreamedPass(
            h=self.h,
            features=[self._features(item) for item in range(len(self.items))],
            kv=self.kv._replace(caches=tuple(self.caches)),
            buffers=Buffers(spare=self.spare, readers=tuple(self.readers), coming=tuple(self.coming), pinned=self.cache),
        )

    def _features(self, item: int) -> jax.Array | None:
        if not isinstance(self.runtime.draft, FeatureDraft):
            return None
        inputs = {layer: fetched(h) for layer, h in self.inputs[item].items()}
        return self._offloaded(item, features(self.runtime, self._h(item), inputs))

    def _h(self, item: int) -> jax.Array:
        """The hidden states of an item on the accelerator."""
        return fetched(self.h[item])

    def _keep(self, task: Task, h: jax.Array) -> None:
        """What attends on the accelerator stays there until its layer is done."""
        last = "post_attention" if self.runtime.config.moe_index[task.layer] is None else "experts"
        stays = task.kind != last and self.attends_chunk(self.items[task.item])
        self.h[task.item] = h if stays else self._offloaded(task.item, h)

    def _offloaded(self, item: int, h: jax.Array) -> jax.Array:
        return jax.device_put(h, self.runtime.pinned_sharding) if self.items[item].offloaded else h

    def _note(self, task: Task, start_s: float, outputs) -> None:
        """outputs: waited for only where spans are wanted."""
        spans = self.runtime.workers.spans
        if spans is not None:
            jax.block_until_ready(outputs)
            spans.append(Span(task.kind, task.resource, task.layer, task.item, start_s, time.perf_counter()))

    def _embed(self, task: Task) -> None:
        self._keep(task, stages.embed(self.runtime.weights, jnp.asarray(self.items[task.item].tokens)))

    def _pre_attention(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, weights = self.runtime.config.layers[task.layer], self.runtime.weights.layers[task.layer]
        if task.layer in self.runtime.feature_layers:
            self.inputs[task.item][task.layer] = self.h[task.item]
        h = self._h(task.item)
        if self.attends_chunk(self.items[task.item]):
            self._keep(task, h)
        projected = stages.pre_attention(config, weights, h, self.lengths[task.item], self.items[task.item].tree)
        self.projected[task.item] = (*projected, weights.sinks)
        self._note(task, start_s, projected)

    def _attend_chunk(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, where = self.runtime.config.layers[task.layer], (self.lengths[task.item], self.num_new[task.item])
        self.attended[task.item] = self.staging.attend(config, self.projected[task.item], *where)
        self._note(task, start_s, self.attended[task.item])

    def _store(self, task: Task) -> None:
        _, k, v, _ = self.projected[task.item]
        self.projected[task.item] = self.runtime.to_host((k, v))

    def _append(self, task: Task) -> None:
        self.appended.append(self.runtime.workers.cpu.submit(self._write, task, self.projected.pop(task.item)))

    def _write(self, task: Task, projected) -> None:
        """In the CPU worker: keys and values of prompts that attended on the accelerator."""
        projected = self.runtime.on_host(projected)
        start_s = time.perf_counter()
        config, where = self.runtime.config.layers[task.layer], self.host[task.item][:3]
        cache = stages.append_paged(config, *projected, self.caches[task.layer], *where)
        self.caches[task.layer] = jax.block_until_ready(cache)
        self._note(task, start_s, cache)

    def _to_host(self, task: Task) -> None:
        self.projected[task.item] = self.runtime.to_host(self.projected[task.item])

    def _attention(self, task: Task) -> None:
        projected = self.projected.pop(task.item)
        self.attended[task.item] = self.runtime.workers.cpu.submit(self._attend, task, projected)

    def _attend(self, task: Task, projected) -> jax.Array:
        """In the CPU worker, one at a time and in order, so that a chunk finds the rows of the chunks before it."""
        projected = self.runtime.on_host(projected)
        start_s = time.perf_counter()
        config = self.runtime.config.layers[task.layer]
        cache = self.caches[task.layer]
        out, self.caches[task.layer] = jax.block_until_ready(stages.attend_paged(config, *projected, cache, *self.host[task.item]))
        self._note(task, start_s, out)
        return out

    def _to_accelerator(self, task: Task) -> None:
        self.attended[task.item] = self.runtime.to_accelerator(self.attended[task.item].result())

    def _post_attention(self, task: Task) -> None:
        start_s = time.perf_counter()
        config, weights = self.runtime.config.layers[task.layer], self.runtime.weights.layers[task.layer]
        attended, num_new = self.attended.pop(task.item), self.num_new[task.item]
        h, *routed = stages.post_attention(config, weights, self._h(task.item), attended, num_new)
        self.routed[task.item] = routed
        self._keep(task, h)
        self._note(task, start_s, h)

    def _experts(self, task: Task) -> None:
        pinned = self.pinned.get(task.layer)
        if pinned is None and self.due is not None:  # the first item of the layer
            self.current, self.due, self.readers = self.due.result(), None, []
        layer = self.current if pinned is None else pinned
        start_s = time.perf_counter()
        x, routing = self.routed.pop(task.item)
        config = self.runtime.config.layers[task.layer]
        h = stages.experts(config, self._h(task.item), x, routing, layer, self.every_expert)
        self._keep(task, h)
        self._note(task, start_s, h)
        if pinned is None:
            self.readers.append(self.h[task.item])
            self.spare = self.current

    def _stream(self, task: Task) -> None:
        self.due = self.coming.popleft()
        layer = self.runtime.store.send_for(self.runtime.config.moe_index[task.layer])
        self.coming.append(self.runtime.workers.link.submit(self._bring, task, layer, self.spare, tuple(self.readers)))
        self.spare = None

    def _bring(self, task: Task, layer: int, buffer: jax.Array, readers) -> jax.Array:
        """In the link worker: the layer's experts, once the buffer is no longer read."""
        jax.block_until_ready(readers)
        start_s = time.perf_counter()
        buffer = self.runtime.store.stream(buffer, layer)
        self._note(task, start_s, buffer)
        return buffer
