"""What a streamed pass consists of: tasks on resources, and what each of them waits for (SpecMoEOff, 4.1 and 5.2). Pure.

The engine executes this list (engine/streaming.py) and the simulator times it (simulate.py): there is no second description.
Per layer and item `other1` -> queries, keys, values to the host -> attention on the CPU -> back -> `other2` -> experts, while the
experts of a later layer stream into a free one of two or more buffers, unless they are pinned on the accelerator; the first
layers' of the next pass stream through the drafting (one layer with two buffers, as in the paper; with more the link is busy
for longer).
"""

from typing import NamedTuple

ACCELERATOR, CPU, UP, DOWN = "accelerator", "cpu attention", "link to accelerator", "link to host"
RESOURCES = (ACCELERATOR, CPU, UP, DOWN)

_RESOURCE_OF = {
    "embed": ACCELERATOR,
    "other1": ACCELERATOR,
    "to_host": DOWN,
    "attention": CPU,
    "to_accelerator": UP,
    "other2": ACCELERATOR,
    "experts": ACCELERATOR,
    "stream": UP,
}
KINDS = tuple(_RESOURCE_OF)


class Task(NamedTuple):
    """One piece of a pass. A resource does one task at a time: of those that can start the most urgent, in the order of the list.

    item: the work item (a micro-batch, or a chunk of prompts), or for `stream` the chunk (an expert) of the layer.
    after: places in the list of the tasks that must have ended; a negative place is one of the pass before, counted
    from its end.
    """

    kind: str
    layer: int
    item: int
    after: tuple[int, ...]

    @property
    def resource(self) -> str:
        return _RESOURCE_OF[self.kind]

    @property
    def urgent(self) -> bool:
        """Weights give way to everything else on the link, chunk by chunk."""
        return self.kind != "stream"


def spread(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` of the layers with experts, evenly: the link works on the next streamed one while a pinned one computes."""
    return tuple(layer for i, layer in enumerate(layers) if (i + 1) * count // len(layers) > i * count // len(layers))


def pass_tasks(
    has_experts: tuple[bool, ...], items: int, chunks: int, buffers: int = 2, pinned: tuple[int, ...] = ()
) -> tuple[Task, ...]:
    """The tasks of one pass of `items` work items, in an order in which they can be issued one after the other.

    has_experts: per layer. chunks: pieces in which a layer's experts cross the link. buffers: 2 to the streamed layers. pinned:
    layers whose experts stay on the accelerator, so nothing streams for them. The streams of the first buffers - 1 streamed
    layers are those of the next pass and come late in the list.
    """
    streamed = [layer for layer, has in enumerate(has_experts) if has and layer not in pinned]
    order = _order(has_experts, streamed, items, chunks, buffers)
    place = {key: i for i, key in enumerate(order)}
    return tuple(Task(*key, after=_after(key, place, has_experts, streamed, items, chunks, buffers)) for key in order)


def _order(has_experts, streamed: list[int], items: int, chunks: int, buffers: int) -> list[tuple[str, int, int]]:
    """(kind, layer, item). A layer's stream is issued when the layer before has been handed to the CPU."""
    head = ("other1", "to_host", "attention")
    order = [(kind, 0, item) for item in range(items) for kind in ("embed", *head)]
    for layer, has in enumerate(has_experts):
        if layer in streamed:
            following = streamed[(streamed.index(layer) + buffers - 1) % len(streamed)]
            order += [("stream", following, chunk) for chunk in range(chunks)]
        for item in range(items):
            order += [("to_accelerator", layer, item), ("other2", layer, item)]
            order += [("experts", layer, item)] if has else []
            order += [(kind, layer + 1, item) for kind in head] if layer + 1 < len(has_experts) else []
    return order


def _after(key, place: dict, has_experts, streamed: list[int], items: int, chunks: int, buffers: int) -> tuple[int, ...]:
    kind, layer, item = key
    last = {True: "experts", False: "other2"}
    pieces = range(chunks) if layer in streamed else ()
    before = {
        "embed": lambda: (),
        "other1": lambda: (("embed", 0, item) if layer == 0 else (last[has_experts[layer - 1]], layer - 1, item),),
        "to_host": lambda: (("other1", layer, item),),
        "attention": lambda: (("to_host", layer, item),),
        "to_accelerator": lambda: (("attention", layer, item),),
        "other2": lambda: (("to_accelerator", layer, item),),
        "experts": lambda: (("other2", layer, item), *(("stream", layer, chunk) for chunk in pieces)),
        "stream": lambda: _users_of_the_buffer(streamed, layer, items, buffers),
    }
    places = [place[name] for name in before[kind]()]
    here = place[key]
    # What is written later in the list than its user belongs to the pass before.
    return tuple(i if i < here else i - len(place) for i in places)


def _users_of_the_buffer(streamed: list[int], layer: int, items: int, buffers: int) -> tuple[tuple[str, int, int], ...]:
    """The experts of as many streamed layers before as there are buffers must have been computed."""
    user = streamed[(streamed.index(layer) - buffers) % len(streamed)]
    return tuple(("experts", user, item) for item in range(items))
