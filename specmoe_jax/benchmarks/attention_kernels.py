"""chunked_attention against its peers, in ragged batches, with and without append, and what one call costs."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.benchmarks import kernel_peers
from specmoe_jax.benchmarks.cold_rounds import Rounds, Work, row
from specmoe_jax.ops.xla.attention import rows

REF_TOKENS = 16384  # requests x length up to which the jnp form is timed: beyond it takes seconds
SHORTEST, LONGEST = 64, 4096  # of a ragged batch
CALLS = 64  # of one program, where the cost of a call is measured
CALL_LENGTH = 512


class Shape(NamedTuple):
    """Query heads, KV heads, head dim; requests, new tokens of each; dtype of queries and cache."""

    H: int
    K: int
    D: int
    B: int
    n: int
    dtype: jnp.dtype

    def case(self, what: str, **more) -> dict:
        length = f" l={more['length']}" if "length" in more else ""
        shape = {"dtype": str(self.dtype), "batch": self.B, "new_tokens": self.n}
        return {"case": f"{what} {self.dtype} b={self.B}{length} n={self.n}"} | shape | more

    def work(self, lengths) -> Work:
        """Each request's cache is read once; every new token attends all of it."""
        tokens = int(np.sum(np.asarray(lengths, np.int64) + self.n))
        return Work(2 * self.K * self.D * self.dtype.itemsize * tokens, 4 * self.H * self.D * self.n * tokens)


def inputs(s: Shape, S: int, lengths) -> tuple:
    """q, k_new, v_new, k, v, lengths: one random request repeated, whose new rows are the last of the cache."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), s.dtype)  # noqa: E731
    k_row, v_row = draw(1, s.K, S, s.D), draw(1, s.K, S, s.D)
    k, v = (jnp.repeat(x, s.B, 0) for x in (k_row, v_row))
    new = (jnp.moveaxis(jnp.repeat(x[:, :, S - s.n :], s.B, 0), 1, 2) for x in (k_row, v_row))
    return draw(s.B, s.n, s.H, s.D), *new, k, v, jnp.asarray(lengths, jnp.int32)


class Own:
    """One of our forms, with its caches donated from call to call (a call writes the same rows again)."""

    def __init__(self, op, q, k_new, v_new, caches, lengths):
        self.step = jax.jit(op, donate_argnums=tuple(range(3, 3 + len(caches))))
        self.args, self.caches, self.lengths = (q, k_new, v_new), caches, lengths

    def __call__(self):
        out, *self.caches = self.step(*self.args, *self.caches, self.lengths)
        return jax.block_until_ready(out)


class OneByOne:
    """n calls of one token each: decoding without verification in chunks."""

    def __init__(self, q, k_new, v_new, cache, lengths):
        cut = lambda x, t: x[:, t : t + 1] + 0  # noqa: E731
        self.parts = [tuple(cut(x, t) for x in (q, k_new, v_new)) for t in range(q.shape[1])]
        self.lengths = [lengths + t for t in range(q.shape[1])]
        self.step = jax.jit(ops.chunked_attention_packed, donate_argnums=3)
        self.cache = cache

    def __call__(self):
        outs = []
        for part, lengths in zip(self.parts, self.lengths, strict=True):
            out, self.cache = self.step(*part, self.cache, lengths)
            outs.append(jax.block_until_ready(out))
        return jnp.concatenate(outs, 1)


def packed(s: Shape, S: int, lengths) -> Own:
    q, k_new, v_new, k, v, lengths = inputs(s, S, lengths)
    return Own(ops.chunked_attention_packed, q, k_new, v_new, (ops.pack_cache(k, v),), lengths)


def without_kernels(q, k_new, v_new, k_cache, v_cache, lengths):
    """What runs where the compiled kernels do not."""
    num_new = jnp.full_like(lengths, q.shape[1])
    arrays = (q, k_new, v_new, k_cache, v_cache, lengths, num_new, None, None)
    return rows(*arrays, scale=q.shape[3] ** -0.5, window=None, softcap=None, chunk=None)


def variants(s: Shape, L: int, threads: int) -> dict[str, Callable[[], Callable]]:
    """Makers of what is timed at uniform length L; a peer's raises ImportError, OSError or AttributeError if it does not load."""
    q, k_new, v_new, k, v, lengths = inputs(s, L + s.n, [L] * s.B)
    pack = functools.partial(ops.pack_cache, k, v)
    own = lambda op, *caches: Own(op, q, k_new, v_new, caches, lengths)  # noqa: E731
    fold = lambda: kernel_peers.folded(q, k, v, k_new, v_new)  # noqa: E731
    makers = {
        "packed": lambda: own(ops.chunked_attention_packed, pack()),
        "rows": lambda: own(ops.chunked_attention, k + 0, v + 0),
        "int8": lambda: own(ops.chunked_attention_packed, pack(jnp.int8)),
        "one_by_one": lambda: OneByOne(q, k_new, v_new, pack(), lengths),
        "torch_folded": lambda: kernel_peers.TorchFolded(*fold(), s.n),
        "mkl": lambda: kernel_peers.MklGemm(*fold(), s.n, threads),
        "vllm": lambda: kernel_peers.Vllm(q, k, v, k_new, v_new),
    }
    if s.B * L <= REF_TOKENS:
        makers["ref"] = lambda: own(without_kernels, k + 0, v + 0)
    return makers


def ragged(s: Shape, rounds: Rounds) -> dict:
    """Lengths from 64 to 4096 in one batch beside equal ones of the same sum; `times_slower` of uniform is the ratio wanted."""
    lengths = np.linspace(SHORTEST, LONGEST, s.B).round().astype(np.int64)
    uniform = lengths.sum() // s.B + (np.arange(s.B) < lengths.sum() % s.B)
    S = LONGEST + s.n
    calls = {"ragged": packed(s, S, lengths), "uniform": packed(s, S, uniform)}
    figures = row(s.case(f"ragged {SHORTEST}..{LONGEST}", length_sum=int(lengths.sum())), calls, s.work(lengths), rounds)
    return figures | {"max_difference": {}}  # they attend different tokens


def append(s: Shape, L: int, rounds: Rounds) -> dict:
    """Append and attention in one call beside attention over a cache of the same size that is full, so that nothing is appended.

    Both read L + n tokens of each request; the full one has no mask among the new tokens either.
    """
    calls = {"no_append": packed(s, L + s.n, [L + s.n] * s.B), "append": packed(s, L + s.n, [L] * s.B)}
    figures = row(s.case("append", length=L), calls, s.work([L] * s.B), rounds)
    return figures | {"max_difference": {}}  # they attend different tokens


class Calls:
    """A program of CALLS calls, each on the cache that the one before returned; seconds of one call."""

    def __init__(self, s: Shape, L: int, num_new: int):
        q, k_new, v_new, k, v, lengths = inputs(s, L + s.n, [L] * s.B)
        count = jnp.full(s.B, num_new, jnp.int32)

        def program(cache):
            for _ in range(CALLS):
                out, cache = ops.chunked_attention_packed(q, k_new, v_new, cache, lengths, num_new=count)
            return out, cache

        self.step, self.cache = jax.jit(program, donate_argnums=0), ops.pack_cache(k, v)
        self()

    def __call__(self) -> float:
        start = time.perf_counter()
        out, self.cache = self.step(self.cache)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / CALLS


def overhead(s: Shape, rounds: Rounds) -> dict:
    """What one call costs at 512 cached tokens beyond the attention itself, inside one program; caches warm.

    The kernel's own time for 512 tokens is what 1024 take longer than 512; the overhead is what 512 take beyond that, so it holds
    the call, the hand-over to the threads and all else that does not grow with the length. `empty_us` is a call without new tokens.
    """
    short, double = Calls(s, CALL_LENGTH, s.n), Calls(s, 2 * CALL_LENGTH, s.n)
    empty = Calls(s, CALL_LENGTH, 0)
    times = 1e6 * np.array([[short(), double(), empty()] for _ in range(4 * rounds.count)])
    t512, t1024, t_empty = np.median(times, 0)
    extra = np.median(2 * times[:, 0] - times[:, 1])
    figures = {"us": float(t512), "us_of_1024": float(t1024), "empty_us": float(t_empty), "overhead_us": float(extra)}
    return s.case("overhead", length=CALL_LENGTH) | {"calls": CALLS, "rounds": len(times)} | figures
