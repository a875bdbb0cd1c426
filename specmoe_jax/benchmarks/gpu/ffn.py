"""The experts' FFN on the accelerator: our form beside others, at Mixtral's and at Qwen3's shape."""

import concurrent.futures
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.benchmarks.gpu import record
from specmoe_jax.benchmarks.gpu.timing import seconds
from specmoe_jax.ops.pallas import grouped_experts
from specmoe_jax.ops.xla import experts as xla_experts

FULL = {"shapes": ((8, 4096, 14336, 2), (128, 2048, 768, 8)), "tokens": (64, 512, 8, 2048), "matrix": 8192}
SMALL = {"shapes": ((4, 64, 128, 2),), "tokens": (8,), "matrix": 256}
COMPILERS = 8  # programs that are compiled at a time, beside the measurements


def rows(sizes: dict) -> Iterator[dict]:
    """Per shape [E, M, F, A] and tokens: seconds of every form, as shares of what this device reads and multiplies per second."""
    record.say("ffn: read rate and peak")
    limits = {"read_bytes_per_s": read_rate(sizes["matrix"]), "flop_per_s": product_rate(sizes["matrix"])}
    yield {"question": "limits"} | limits
    if importlib.util.find_spec("tokamax") is None:
        yield {"question": "tokamax", "skipped": "not installed"}
    for shape in sizes["shapes"]:
        yield from record.asked(f"ffn: shape {list(shape)}", lambda shape=shape: _of_shape(shape, sizes["tokens"], limits))


def _of_shape(shape: tuple[int, ...], all_tokens: tuple[int, ...], limits: dict) -> Iterator[dict]:
    experts, model, hidden, _ = shape
    blocks = jax.random.normal(jax.random.key(0), (experts, 3, hidden, model), jnp.bfloat16) / model**0.5
    given = {tokens: _tokens_of(shape, tokens) for tokens in all_tokens}
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as compilers:
        programs = {
            (tokens, name): compilers.submit(_compiled, form, blocks, *given[tokens])
            for tokens in all_tokens
            for name, form in forms().items()
        }
        for tokens in all_tokens:
            want = None
            for name in forms():
                row = {"question": "ffn", "form": name, "shape": list(shape), "tokens": tokens}
                x, ids = given[tokens]
                try:
                    form, row["compile_s"] = programs[tokens, name].result()
                    got = jax.block_until_ready(form(x, blocks, ids))
                    want = got if want is None else want
                    row |= _timed(functools.partial(form, x, blocks, ids), shape, ids, limits)
                    row["difference"] = float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max())
                except Exception as e:  # of a form; the others are still to be measured
                    row["failed"] = f"{type(e).__name__}: {str(e)[:200]}"
                yield row


def check() -> dict:
    """The grouped products beside XLA's tiles on a small pool in which slots share blocks of rows."""
    shape = (8, 256, 256, 2)
    blocks = jax.random.normal(jax.random.key(0), (8, 3, 256, 256), jnp.bfloat16) / 16
    x, ids = _tokens_of(shape, 24)
    found = forms()
    want, got = (jax.jit(found[name])(x, blocks, ids) for name in ("XLA, tiles", "grouped over slots"))
    difference = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    return {"agrees": difference < 0.01, "difference": difference}


def _tokens_of(shape: tuple[int, ...], tokens: int) -> tuple[jax.Array, jax.Array]:
    """x [n, M] and ids [n, A]."""
    experts, model, _, chosen = shape
    x = jax.random.normal(jax.random.key(1), (tokens, model), jnp.bfloat16)
    return x, jax.random.randint(jax.random.key(2), (tokens, chosen), 0, experts, jnp.int32)


def _compiled(form: Callable, blocks: jax.Array, x: jax.Array, ids: jax.Array) -> tuple[Callable, float]:
    start_s = time.perf_counter()
    return jax.jit(form).lower(x, blocks, ids).compile(), time.perf_counter() - start_s


def _timed(call: Callable, shape: tuple[int, ...], ids: jax.Array, limits: dict) -> dict:
    _, model, hidden, _ = shape
    used, time_s = len(set(ids.ravel().tolist())), seconds(call)
    reads_s = used * 6 * hidden * model / limits["read_bytes_per_s"]
    products_s = 6 * ids.size * hidden * model / limits["flop_per_s"]
    bound = "reads" if reads_s > products_s else "peak"
    return {"seconds": time_s, "share_of_roofline": max(reads_s, products_s) / time_s, "bound": bound}


def forms() -> dict[str, Callable]:
    """name -> (x [n, M], blocks [E, 3, F, M], ids [n, A]) -> [n, A, M]; what the engine runs comes first."""
    here = jax.devices()[0].platform
    kernels = importlib.import_module(grouped_experts.KERNELS["tpu" if here == "tpu" else "cuda"].module)
    found = {
        "engine": ops.expert_ffn,
        "XLA, tiles": xla_experts.tiles,
        "grouped over slots": functools.partial(kernels.experts, interpret=here == "cpu"),
        "ragged_dot": functools.partial(_grouped, jax.lax.ragged_dot),
        "per-expert loop": _loop,
    }
    if importlib.util.find_spec("tokamax") is not None:
        found["tokamax ragged_dot"] = functools.partial(_grouped, importlib.import_module("tokamax").ragged_dot)
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
