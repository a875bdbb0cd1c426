"""When the tasks of a streamed pass run: an event simulation of pipeline.pass_tasks, the list that the engine executes. Pure.

A resource does one task at a time, of those that can start the most urgent, in the order of the list. The drafting lies between
two passes, on the accelerator; the link goes on meanwhile. The iteration is the distance of two passes once they are alike.

Deviation: the engine issues from one thread, in the order of the list, and waits there for attention and for a layer's experts;
here a later task that is ready may start. With that thread modelled too, no iteration changed (twelve settings of Mixtral-8x7B).
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU, DOWN, RESOURCES, UP, Task

PASSES = 4  # the buffers reach back two layers and into the pass before, so the third and fourth are alike
DRAFT = "draft"


class Span(NamedTuple):
    """One task of the last pass. Seconds from the start of that pass; a stream may have begun before it."""

    kind: str
    layer: int
    micro_batch: int
    resource: str
    start_s: float
    end_s: float


class Simulation(NamedTuple):
    """busy_s: of the last pass, by resource, the drafting in the accelerator's. critical: the spans that determined the iteration.

    naive_s: what a maximum over the resources layer by layer would have said (the estimator of the authors' artifact).
    """

    iteration_s: float
    naive_s: float
    busy_s: dict[str, float]
    spans: tuple[Span, ...]
    critical: tuple[Span, ...]


class _Node(NamedTuple):
    kind: str
    layer: int
    micro_batch: int
    resource: str
    urgent: bool
    seconds: float
    after: tuple[int, ...]


def simulate(
    tasks: tuple[Task, ...],
    seconds: Callable[[Task], float],
    *,
    draft_s: float = 0.0,
    accelerator_is_cpu: bool = False,
    overlap: float = 1.0,
) -> Simulation:
    """seconds: of each task. draft_s: between two passes. accelerator_is_cpu, overlap: of the Hardware.

    What of a transfer does not hide behind computation (1 - overlap) is added to the iteration.
    """
    nodes = _unroll(tasks, [seconds(task) for task in tasks], draft_s)
    starts, ends, causes = _schedule(nodes, accelerator_is_cpu)
    length = len(tasks) + 1
    first = len(nodes) - length
    begin_s = ends[first - 1]
    last = range(first, len(nodes))
    busy_s = {name: sum(nodes[i].seconds for i in last if nodes[i].resource == name) for name in RESOURCES}
    hidden = min(max(busy_s[UP], busy_s[DOWN]), busy_s[ACCELERATOR] + busy_s[CPU] if accelerator_is_cpu else busy_s[ACCELERATOR])
    spans = [
        Span(node.kind, node.layer, node.micro_batch, node.resource, start - begin_s, end - begin_s)
        for node, start, end in zip(nodes, starts, ends, strict=True)
    ]
    critical, at = [], len(nodes) - 1
    while at is not None and ends[at] > begin_s:
        critical.append(spans[at])
        at = causes[at]
    return Simulation(
        iteration_s=ends[-1] - begin_s + (1 - overlap) * hidden,
        naive_s=naive_seconds(tasks, seconds, draft_s=draft_s, accelerator_is_cpu=accelerator_is_cpu),
        busy_s=busy_s,
        spans=tuple(spans[first:]),
        critical=tuple(reversed(critical)),
    )


def naive_seconds(tasks, seconds: Callable[[Task], float], *, draft_s: float = 0.0, accelerator_is_cpu: bool = False) -> float:
    """The drafting and the sum over layers of the busiest resource's time in each, as if all of a layer overlapped."""
    layers: dict[int, dict[str, float]] = {}
    for task in tasks:
        server = _server(task.resource, accelerator_is_cpu)
        busy = layers.setdefault(task.layer, {})
        busy[server] = busy.get(server, 0.0) + seconds(task)
    return draft_s + sum(max(busy.values()) for busy in layers.values())


def _server(resource: str, accelerator_is_cpu: bool) -> str:
    return ACCELERATOR if accelerator_is_cpu and resource == CPU else resource


def _unroll(tasks: tuple[Task, ...], seconds: list[float], draft_s: float) -> list[_Node]:
    """PASSES passes one after the other, each followed by its drafting, for which its last computations are needed."""
    length, nodes = len(tasks) + 1, []
    last_layer = max(task.layer for task in tasks)
    final = [i for i, task in enumerate(tasks) if task.layer == last_layer and task.kind in ("post_attention", "experts", "append")]
    for start in range(0, PASSES * length, length):
        for task, duration in zip(tasks, seconds, strict=True):
            # A negative place counts from the end of the list of the pass before, which the drafting follows here.
            places = [start + place if place >= 0 else start - 1 + place for place in task.after]
            places += [start - 1] if task.kind == "embed" else []
            after = tuple(place for place in places if place >= 0)
            nodes.append(_Node(task.kind, task.layer, task.micro_batch, task.resource, task.urgent, duration, after))
        nodes.append(_Node(DRAFT, last_layer, 0, ACCELERATOR, True, draft_s, tuple(start + i for i in final)))
    return nodes


def _schedule(nodes: list[_Node], accelerator_is_cpu: bool) -> tuple[list[float], list[float], list[int | None]]:
    """Starts, ends, and for each node the one whose end let it start (None at time 0)."""
    waiting = [len(node.after) for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for place in node.after:
            users[place].append(i)
    servers = [_server(node.resource, accelerator_is_cpu) for node in nodes]
    ready: dict[str, list[tuple[bool, int]]] = {server: [] for server in servers}
    free = dict.fromkeys(ready, True)
    starts, ends = [0.0] * len(nodes), [0.0] * len(nodes)
    causes: list[int | None] = [None] * len(nodes)
    running: list[tuple[float, int]] = []
    served: dict[str, int | None] = dict.fromkeys(ready)  # the last task of each resource
    now_s = 0.0

    def enqueue(i: int) -> None:
        heapq.heappush(ready[servers[i]], (not nodes[i].urgent, i))

    for i, count in enumerate(waiting):
        if count == 0:
            enqueue(i)
    while True:
        for server, queue in ready.items():
            if free[server] and queue:
                _, i = heapq.heappop(queue)
                causes[i] = next((place for place in nodes[i].after if ends[place] == now_s), served[server])
                free[server], served[server], starts[i], ends[i] = False, i, now_s, now_s + nodes[i].seconds
                heapq.heappush(running, (ends[i], i))
        if not running:
            return starts, ends, causes
        now_s, ended = heapq.heappop(running)
        finished = [ended]
        while running and running[0][0] == now_s:
            finished.append(heapq.heappop(running)[1])
        for i in finished:
            free[servers[i]] = True
            for user in users[i]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    enqueue(user)
