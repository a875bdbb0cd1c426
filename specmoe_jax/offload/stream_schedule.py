"""The tasks of a streamed pass on their resources, and their dependencies (SpecMoEOff, 4.1 and 5.2). Pure.

The engine executes this list (engine/flows/stream_pass.py) and the simulator times it (simulate.py): one description.
Per layer and micro-batch: `pre_attention` -> queries, keys, values to the host -> attention on the CPU -> back ->
`post_attention` -> experts, while the experts of a later layer stream into a free one of two or more buffers, unless they are
pinned on the accelerator. A recurrent layer keeps its states on the accelerator, and `recur` there stands in the place of the
three tasks between. The first layers' of the next pass stream through the drafting (one layer with two buffers, as in the
paper; with more the link is busy for longer).
"""

import functools
from typing import NamedTuple

ACCELERATOR, CPU, UP, DOWN = "accelerator", "cpu attention", "link to accelerator", "link to host"
RESOURCES = (ACCELERATOR, CPU, UP, DOWN)

_RESOURCE_OF = {
    "embed": ACCELERATOR,
    "pre_attention": ACCELERATOR,
    "to_host": DOWN,
    "attention": CPU,
    "to_accelerator": UP,
    "post_attention": ACCELERATOR,
    "experts": ACCELERATOR,
    "stream": UP,
    "attend_chunk": ACCELERATOR,
    "store": DOWN,
    "append": CPU,
    "recur": ACCELERATOR,
}
KINDS = tuple(_RESOURCE_OF)


class Task(NamedTuple):
    """One piece of a pass. A resource does one task at a time: of those that can start the most urgent, in the order of the list.

    micro_batch: its place in the pass; chunks of prompts are micro-batches too. Of `stream` the chunk (an expert) of the layer.
    after: places in the list of the tasks that must have ended; a negative place is one of the pass before, counted
    from its end.
    """

    kind: str
    layer: int
    micro_batch: int
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


class _Shape(NamedTuple):
    """The shape of a pass, as arguments of `pass_tasks`. streamed: layers whose experts cross the link."""

    has_experts: tuple[bool, ...]
    recurrent: tuple[int, ...]
    streamed: list[int]
    decoding: range
    prompts: range
    chunks: int
    buffers: int


@functools.lru_cache(maxsize=64)
def pass_tasks(
    has_experts: tuple[bool, ...],
    micro_batches: int,
    chunks: int,
    buffers: int = 2,
    pinned: tuple[int, ...] = (),
    prompts: int = 0,
    recurrent: tuple[int, ...] = (),
) -> tuple[Task, ...]:
    """The tasks of one pass of so many micro-batches, in an order in which they can be issued one after the other.

    has_experts: per layer. chunks: pieces in which a layer's experts cross the link. buffers: 2 to the streamed layers. pinned:
    layers whose experts stay on the accelerator, so nothing streams for them. prompts: so many of the last micro-batches are chunks
    of prompts that attend on the accelerator (`attend_chunk`), while their keys and values go to the host (`store`, `append`).
    recurrent: layers without a cache. The
    streams of the first buffers - 1 streamed layers are those of the next pass and come late in the list.
    """
    streamed = [layer for layer, has in enumerate(has_experts) if has and layer not in pinned]
    decoding = micro_batches - prompts
    shape = _Shape(has_experts, recurrent, streamed, range(decoding), range(decoding, micro_batches), chunks, buffers)
    order = _order(shape)
    place = {key: i for i, key in enumerate(order)}
    return tuple(Task(*key, after=_after(key, place, shape)) for key in order)


def _order(shape: _Shape) -> list[tuple[str, int, int]]:
    """(kind, layer, micro_batch). A layer's stream is issued when the layer before has been handed to the CPU.

    A prompt's tasks of a layer are issued together, so that nothing of it is kept between; before those of the
    micro-batches that wait for the CPU's attention.
    """
    streamed = shape.streamed

    def head(layer: int) -> tuple[str, ...]:
        return ("pre_attention", "recur") if layer in shape.recurrent else ("pre_attention", "to_host", "attention")

    order = [(kind, 0, micro_batch) for micro_batch in shape.decoding for kind in ("embed", *head(0))]
    for layer, has in enumerate(shape.has_experts):
        experts = ("experts",) if has else ()
        if layer in streamed:
            following = streamed[(streamed.index(layer) + shape.buffers - 1) % len(streamed)]
            order += [("stream", following, chunk) for chunk in range(shape.chunks)]
        recurs = layer in shape.recurrent
        attended = ("recur",) if recurs else ("attend_chunk", "store", "append")
        for micro_batch in shape.prompts:
            kinds = (*(() if layer else ("embed",)), "pre_attention", *attended, "post_attention", *experts)
            order += [(kind, layer, micro_batch) for kind in kinds]
        for micro_batch in shape.decoding:
            back = () if recurs else ("to_accelerator",)
            order += [(kind, layer, micro_batch) for kind in (*back, "post_attention", *experts)]
            order += [(kind, layer + 1, micro_batch) for kind in head(layer + 1)] if layer + 1 < len(shape.has_experts) else []
    return order


def _after(key, place: dict, shape: _Shape) -> tuple[int, ...]:
    kind, layer, micro_batch = key
    last = {True: "experts", False: "post_attention"}
    pieces = range(shape.chunks) if layer in shape.streamed else ()
    attended = "attend_chunk" if micro_batch in shape.prompts else "to_accelerator"
    attended = "recur" if layer in shape.recurrent else attended
    before = {
        "embed": lambda: (),
        "pre_attention": lambda: (
            ("embed", 0, micro_batch) if layer == 0 else (last[shape.has_experts[layer - 1]], layer - 1, micro_batch),
        ),
        "to_host": lambda: (("pre_attention", layer, micro_batch),),
        "attention": lambda: (("to_host", layer, micro_batch),),
        "to_accelerator": lambda: (("attention", layer, micro_batch),),
        "post_attention": lambda: ((attended, layer, micro_batch),),
        "attend_chunk": lambda: (("pre_attention", layer, micro_batch),),
        "store": lambda: (("pre_attention", layer, micro_batch),),
        "append": lambda: (("store", layer, micro_batch),),
        "recur": lambda: (("pre_attention", layer, micro_batch),),
        "experts": lambda: (("post_attention", layer, micro_batch), *(("stream", layer, chunk) for chunk in pieces)),
        "stream": lambda: _users_of_the_buffer(shape, layer),
    }
    places = [place[name] for name in before[kind]()]
    here = place[key]
    # A task later in the list than its user belongs to the pass before.
    return tuple(i if i < here else i - len(place) for i in places)


def _users_of_the_buffer(shape: _Shape, layer: int) -> tuple[tuple[str, int, int], ...]:
    """The experts of as many streamed layers before as there are buffers must have been computed."""
    user = shape.streamed[(shape.streamed.index(layer) - shape.buffers) % len(shape.streamed)]
    return tuple(("experts", user, micro_batch) for micro_batch in (*shape.decoding, *shape.prompts))
