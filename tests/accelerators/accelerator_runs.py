"""The runs whose programs are compiled for an accelerator: name -> a function that makes one. Imported once jax.jit records."""

import dataclasses
import functools

from engine_cases import plan, run
from two_devices import PLANS

from specmoe_jax import Engine, SamplingParams
from specmoe_jax.benchmarks.gpu import shapes
from specmoe_jax.benchmarks.specmoeoff import acceptance_of, random_head_of
from specmoe_jax.testing import eagle_head, tiny
from tests.packed_experts import packed_model

HALF = dataclasses.replace(
    shapes.mixtral_8x7b(2),
    vocab_size=512,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    expert_hidden=1792,
    num_experts=4,
)
"""In bfloat16 an expert is so much larger than all activations that a copy of one shows in a program's temporary memory."""


def small(a_plan) -> None:
    """Float32, of two layers, and to its end."""
    run(tiny(), a_plan, **({"draft_head": eagle_head(tiny())} if a_plan.draft == "eagle" else {}))


def lossless() -> None:
    """bfloat16 experts in 12 bits, which XLA unpacks."""
    model, _ = packed_model(tiny("bfloat16"), "lossless")
    run(model, plan("specmoe", dtype="bfloat16", prefetch="draft"))


def half(name: str, config=HALF, rows: int = 4, **changes) -> None:
    """Two steps in bfloat16."""
    model = shapes.random_on_device(config)
    head = random_head_of(model) if name == "specmoeoff" else None
    a_plan = plan(name, dtype="bfloat16", batch_size=rows, **changes)
    engine = Engine(model, a_plan, draft_head=head)
    state = engine.init([tuple(range(1, 9))] * rows, SamplingParams(max_new_tokens=4, ignore_eos=True))
    for _ in range(2):
        state, _ = engine.step(state)


RUNS = {name: functools.partial(small, a_plan) for name, a_plan in PLANS.items()} | {
    "lossless": lossless,
    "half resident": functools.partial(half, "resident"),
    "half specmoe": functools.partial(half, "specmoe", synthetic_acceptance=0.9, substitution="random", prefetch="draft"),
    "half streaming": functools.partial(half, "streaming"),
    "half specmoeoff": functools.partial(half, "specmoeoff", draft_length=4, synthetic_acceptance=acceptance_of(4)),
}
MESH_RUNS = {
    "mesh specmoe": functools.partial(small, plan("specmoe", batch_size=8, prefetch="draft", devices=4)),
    "mesh streaming": functools.partial(small, plan("specmoeoff", batch_size=4, draft_length=3, devices=4)),
    "half mesh": functools.partial(half, "specmoe", synthetic_acceptance=0.9, substitution="random", devices=4),
}
"""Of four devices."""
EIGHT = dataclasses.replace(HALF, num_experts=12, expert_hidden=512)
EIGHT_RUNS = {
    "mesh specmoe": functools.partial(half, "specmoe", EIGHT, rows=8, synthetic_acceptance=0.9, substitution="random", devices=8),
    "mesh streaming": functools.partial(half, "streaming", EIGHT, devices=8),
}
"""Of eight, some of which have two experts of a layer and others one."""
EXPERT_BYTES = HALF.expert_params * 2
