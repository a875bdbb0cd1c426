"""expert_ffn with cold weights against the exact forms that XLA can run: tiles, pairs, dense."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.benchmarks.cold_rounds import Rounds, Work, row
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.experts import block_function, expert_ffn
from specmoe_jax.models.packing import is_published, pack, packed_bytes
from specmoe_jax.models.packing.random import random_expert
from specmoe_jax.ops.xla.experts import block_ffn, tiles

CHOICES = 2  # experts of a token
PAIRS_TOKENS, DENSE_TOKENS = 8, 64  # up to which pairs, from which dense can be the best form


class Layers(NamedTuple):
    """A program of `calls` layers in turn, each with `experts` experts of [3, F, M] bfloat16 of its own."""

    calls: int
    experts: int
    M: int
    F: int

    @property
    def expert_bytes(self) -> int:
        return 6 * self.F * self.M


def pairs(x, blocks, slots):
    """One (token, choice) after the other: each reads its expert once."""
    token, slot = jnp.repeat(jnp.arange(x.shape[0]), CHOICES), slots.reshape(-1)
    one = lambda p: block_ffn(x[p[0]][None], jax.lax.dynamic_index_in_dim(blocks, p[1], keepdims=False))[0]  # noqa: E731
    return jax.lax.map(one, (token, slot)).reshape(*slots.shape, -1)


def dense(x, blocks, slots, experts):
    """All tokens through every expert of the layer: the largest products, and most of them wasted where there are many experts."""
    first = slots.min() // experts * experts

    def add(y, e):
        out = block_ffn(x, jax.lax.dynamic_index_in_dim(blocks, first + e, keepdims=False))
        return jnp.where((slots == first + e)[..., None], out[:, None], y), None

    return jax.lax.scan(add, jnp.zeros((*slots.shape, x.shape[1]), jnp.float32), jnp.arange(experts))[0]


def through_layers(ffn: Callable, x, blocks, slots):
    """x [n, M], blocks [calls * experts, 3, F, M], slots [calls, n, CHOICES] -> the sum of what comes out of the layers [n, M].

    Each is given x itself: what one form rounds otherwise than another is then not carried on.
    """
    layer = lambda total, slots: (total + 0.1 * ffn(x, blocks, slots).mean(1), None)  # noqa: E731
    return jax.lax.scan(layer, jnp.zeros(x.shape, jnp.float32), slots)[0]


def weights(s: Layers) -> jax.Array:
    """bfloat16 as uint16 bits, as the engine holds them: XLA would convert the whole store. A million random values, repeated."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal(1_000_003, np.float32) / s.M**0.5, jnp.bfloat16)
    bits = np.asarray(jax.lax.bitcast_convert_type(values, jnp.uint16))
    return jnp.asarray(np.resize(bits, (s.calls * s.experts, 3, s.F, s.M)))


def ffn_rows(s: Layers, tokens: list[int], rounds: Rounds):
    """One row for each number of tokens; shares count the weights of the experts that are needed, once a layer."""
    blocks = weights(s)
    for n in tokens:
        x, slots = inputs(s, n)
        forms = {"kernel": ops.expert_ffn, "tiles": functools.partial(tiles, ffn=None)}
        if n <= PAIRS_TOKENS:
            forms["pairs"] = pairs
        if n >= DENSE_TOKENS:
            forms["dense"] = functools.partial(dense, experts=s.experts)
        calls = {name: _ready(jax.jit(functools.partial(through_layers, f)), x, blocks, slots) for name, f in forms.items()}
        work = Work(len(np.unique(slots)) * s.expert_bytes, 6 * s.calls * n * CHOICES * s.F * s.M)
        case = {"case": f"expert_ffn {s.calls} x {s.experts} of {s.M} x {s.F} n={n}", **s._asdict(), "tokens": n}
        figures = row(case | {"weight_bytes": blocks.nbytes, "bytes_read": work.num_bytes}, calls, work, rounds)
        yield figures | {"best_xla": min(figures["times_slower"], key=figures["times_slower"].get)}


def packed_rows(s: Layers, tokens: list[int], rounds: Rounds, packings: list[str]):
    """`ffn_rows` for experts packed by each of these kinds: decoded in registers, beside unpacked tile by tile."""
    for packing in packings:
        config = ExpertConfig(hidden=s.F, model=s.M, packing=packing)
        blocks = jnp.asarray(np.tile(_packed_expert(config), (s.calls * s.experts, 1)))
        forms = {
            "kernel": functools.partial(expert_ffn, config),
            "tiles": functools.partial(tiles, ffn=block_function(config)),
        }
        for n in tokens:
            x, slots = inputs(s, n)
            calls = {name: _ready(jax.jit(functools.partial(through_layers, f)), x, blocks, slots) for name, f in forms.items()}
            work = Work(len(np.unique(slots)) * packed_bytes(config), 6 * s.calls * n * CHOICES * s.F * s.M)
            case = {
                "case": f"{packing} {s.calls} x {s.experts} of {s.M} x {s.F} n={n}",
                **s._asdict(),
                "tokens": n,
                "packing": packing,
            }
            yield row(case | {"weight_bytes": blocks.nbytes, "bytes_read": work.num_bytes}, calls, work, rounds)


def _packed_expert(config: ExpertConfig) -> np.ndarray:
    rng = np.random.default_rng(0)
    if is_published(config.packing):
        return random_expert(config, rng)
    return pack(config, rng.standard_normal(config.block_shape, np.float32) / np.float32(config.model**0.5))


def inputs(s: Layers, n: int) -> tuple[jax.Array, jax.Array]:
    """x [n, M] in bfloat16, as a model of that type has it, and the slots [calls, n, CHOICES] of a random routing."""
    rng = np.random.default_rng(n)
    x = jnp.asarray(rng.standard_normal((n, s.M), np.float32), jnp.bfloat16)
    chosen = np.array([[rng.choice(s.experts, CHOICES, replace=False) for _ in range(n)] for _ in range(s.calls)])
    return x, jnp.asarray(chosen + s.experts * np.arange(s.calls)[:, None, None], jnp.int32)


def _ready(f, *args):
    return lambda: jax.block_until_ready(f(*args))
