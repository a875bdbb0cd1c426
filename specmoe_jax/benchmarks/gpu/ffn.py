"""The experts' FFN on the accelerator: our form beside others, at Mixtral's and at Qwen3's shape."""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.benchmarks.gpu.timing import seconds
from specmoe_jax.ops.xla.experts import block_ffn, in_tiles

FULL = {"shapes": ((8, 4096, 14336, 2), (128, 2048, 768, 8)), "tokens": (8, 64, 512, 2048, 8192), "matrix": 8192}
SMALL = {"shapes": ((4, 64, 128, 2),), "tokens": (8,), "matrix": 256}


def rows(sizes: dict) -> Iterator[dict]:
    """Per shape [E, M, F, A] and tokens: seconds of every form, as shares of what this device reads and multiplies per second."""
    limits = {"read_bytes_per_s": read_rate(sizes["matrix"]), "flop_per_s": product_rate(sizes["matrix"])}
    yield {"question": "limits"} | limits
    if importlib.util.find_spec("tokamax") is None:
        yield {"question": "tokamax", "skipped": "not installed"}
    for experts, model, hidden, chosen in sizes["shapes"]:
        blocks = jax.random.normal(jax.random.key(0), (experts, 3, hidden, model), jnp.bfloat16) / model**0.5
        for tokens in sizes["tokens"]:
            x = jax.random.normal(jax.random.key(1), (tokens, model), jnp.bfloat16)
            ids = jax.random.randint(jax.random.key(2), (tokens, chosen), 0, experts, jnp.int32)
            used = len(set(ids.ravel().tolist()))
            least_s = max(
                used * 6 * hidden * model / limits["read_bytes_per_s"],
                6 * ids.size * hidden * model / limits["flop_per_s"],
            )
            want = None
            for name, form in forms().items():
                row = {"question": "ffn", "form": name, "shape": [experts, model, hidden, chosen], "tokens": tokens}
                try:
                    got = jax.block_until_ready(form(x, blocks, ids))
                    want = got if want is None else want
                    time_s = seconds(functools.partial(form, x, blocks, ids))
                    error = float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max())
                    row |= {"seconds": time_s, "share_of_roofline": least_s / time_s, "difference": error}
                except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError) as e:
                    row["failed"] = f"{type(e).__name__}: {str(e)[:200]}"
                yield row


def forms() -> dict[str, Callable]:
    """name -> (x [n, M], blocks [E, 3, F, M], ids [n, A]) -> [n, A, M]; ours first, which the others are compared with."""
    found = {
        "ours": jax.jit(ops.expert_ffn),
        **{f"ours, tiles of {rows} rows": jax.jit(functools.partial(in_tiles, block_ffn, rows)) for rows in (16, 64, 256)},
        "ragged_dot": jax.jit(functools.partial(_grouped, jax.lax.ragged_dot)),
        "per-expert loop": jax.jit(_loop),
    }
    if importlib.util.find_spec("tokamax") is not None:
        ragged = importlib.import_module("tokamax").ragged_dot
        found["tokamax ragged_dot"] = jax.jit(functools.partial(_grouped, ragged))
    return found


def _bf16_ffn(x, block):
    """One expert with products of bfloat16, accumulated in float32; the hidden units are rounded once."""
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    gate, up, down = block
    x = x.astype(block.dtype)
    return dot((jax.nn.silu(dot(x, gate.T)) * dot(x, up.T)).astype(block.dtype), down)


def _grouped(product, x, blocks, ids):
    """Tokens sorted by expert, three grouped products."""
    experts, chosen = blocks.shape[0], ids.shape[1]
    order = jnp.argsort(ids.ravel(), stable=True)
    sizes = jnp.bincount(ids.ravel(), length=experts).astype(jnp.int32)
    rows = x[order // chosen]
    gate, up = (product(rows, blocks[:, i].swapaxes(1, 2), sizes) for i in range(2))
    out = product((jax.nn.silu(gate) * up).astype(blocks.dtype), blocks[:, 2], sizes)
    return jnp.zeros(out.shape, jnp.float32).at[order].set(out.astype(jnp.float32)).reshape(*ids.shape, -1)


def _loop(x, blocks, ids):
    """Every expert over every token, kept where it was chosen."""

    def add(i, out):
        return jnp.where((ids == i)[..., None], _bf16_ffn(x, blocks[i])[:, None], out)

    return jax.lax.fori_loop(0, len(blocks), add, jnp.zeros((*ids.shape, x.shape[1]), jnp.float32))


def read_rate(size: int) -> float:
    """Bytes per second of a sum over 16 x size x size bytes."""
    x = jnp.ones((8 * size, size), jnp.bfloat16)
    return x.nbytes / seconds(functools.partial(jax.jit(lambda x: x.astype(jnp.float32).sum()), x))


def product_rate(size: int) -> float:
    """Flop per second of a bfloat16 product."""
    x = jnp.ones((size, size), jnp.bfloat16)
    return 2 * size**3 / seconds(functools.partial(jax.jit(jnp.matmul), x, x))
