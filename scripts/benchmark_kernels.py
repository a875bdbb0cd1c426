"""The CPU kernels beside their jnp twins, their peers and the machine's limits, in interleaved rounds with cold caches.

Prints a table; the last stdout line is one JSON document. Ratios are medians of the ratios within a round: only those hold between
runs. A peer that does not load here (torch, the `mkl` wheel, vllm) is null.
"""

import ctypes
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from specmoe_jax import ops
from specmoe_jax.ops import _ffi

_B = flags.DEFINE_list("batch", ["8"], "requests")
_L = flags.DEFINE_list("length", ["2048"], "cached tokens of each request")
_N = flags.DEFINE_list("new_tokens", ["1", "4", "8"], "new tokens of each request")
_DTYPE = flags.DEFINE_list("dtype", ["bfloat16", "float32"], "of queries and cache")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "query heads, KV heads, head dim (Mixtral)")
_ONLY = flags.DEFINE_list("only", [], "variants to time besides the packed kernel (default: all)")
_EXPERTS = flags.DEFINE_list("experts", [f"8:512:1024:{n}" for n in (1, 8, 64)], "slots:model:hidden:tokens of expert_ffn")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "timed rounds")
_THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "threads of the limits and of torch")

FLUSH_BYTES = 1 << 27  # read between any two calls; beyond the L3 of the machines in mind, and it is the bandwidth's measurement
REF_TOKENS = 16384  # requests x length up to which the jnp form is timed: beyond it takes seconds


def attention_inputs(B, L, n, dtype):
    H, K, D = (int(x) for x in _HEADS.value)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
    k_row, v_row = draw(1, K, L + n, D), draw(1, K, L + n, D)
    k, v = (jnp.repeat(x, B, 0).at[:, :, L:].set(0) for x in (k_row, v_row))
    new = (jnp.moveaxis(jnp.repeat(x[:, :, L:], B, 0), 1, 2) for x in (k_row, v_row))
    return draw(B, n, H, D), *new, k, v, jnp.full(B, L, jnp.int32)


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


def to_torch(x):
    import torch

    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(jax.lax.bitcast_convert_type(x, jnp.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def folded(q, k, v, k_new, v_new):
    """torch q [B, K, G * n, D] (rows of a group together), k, v with the new rows in, mask [G * n, S] or None."""
    import torch

    B, n, H, D = q.shape
    K, S = k.shape[1:3]
    rows = to_torch(q).view(B, n, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * n, D).contiguous()
    k, v = (to_torch(c.at[:, :, S - n :].set(jnp.moveaxis(x, 1, 2))) for c, x in ((k, k_new), (v, v_new)))
    mask = torch.ones(n, S, dtype=torch.bool).tril(S - n).repeat(H // K, 1) if n > 1 else None
    return rows, k, v, mask


def unfold(out, n):
    B, K, R, D = out.shape
    return out.float().view(B, K, R // n, n, D).permute(0, 3, 1, 2, 4).reshape(B, n, K * R // n, D).numpy()


class TorchFolded:
    """scaled_dot_product_attention in its best form: the GQA group folded into the query rows."""

    def __init__(self, rows, k, v, mask, n):
        self.args, self.mask, self.n = (rows, k, v), mask, n

    def __call__(self):
        import torch

        return unfold(torch.nn.functional.scaled_dot_product_attention(*self.args, attn_mask=self.mask), self.n)


def load_mkl():
    for file in importlib.metadata.files("mkl") or ():
        if file.name.startswith("libmkl_rt.so"):
            return ctypes.CDLL(str(pathlib.Path(file.locate()).resolve()), mode=ctypes.RTLD_GLOBAL)
    raise ImportError("the mkl wheel has no libmkl_rt")


class MklGemm:
    """The paper's way: batched GEMM, softmax over the score matrix, batched GEMM (softmax by torch)."""

    def __init__(self, rows, k, v, mask, n):
        import torch

        mkl = load_mkl()
        mkl.MKL_Set_Num_Threads(_THREADS.value)
        bf16 = rows.dtype == torch.bfloat16
        self.gemm = mkl.cblas_gemm_bf16bf16f32 if bf16 else mkl.cblas_sgemm_batch_strided
        (self.B, K, self.R, self.D), self.S = rows.shape, k.shape[2]
        self.batch = self.B * K
        self.rows, self.k, self.v, self.mask, self.n = rows, k, v, mask, n
        self.scores = torch.empty(self.B, K, self.R, self.S)
        self.out = torch.empty(self.B, K, self.R, self.D)

    def multiply(self, a, b, c, transpose_b, scale):
        m, cols, inner = c.shape[2], c.shape[3], a.shape[3]
        order, plain, turned = (ctypes.c_int(x) for x in (101, 111, 112))
        i, f, p = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        shape = order, plain, turned if transpose_b else plain, i(m), i(cols), i(inner), f(scale)
        ldb = i(inner if transpose_b else cols)
        if a.element_size() == 4:
            steps = i(m * inner), i(inner * cols), i(m * cols)
            pa, pb, pc = (p(x.data_ptr()) for x in (a, b, c))
            self.gemm(*shape, pa, i(inner), steps[0], pb, ldb, steps[1], f(0), pc, i(cols), steps[2], i(self.batch))
            return
        for x in range(self.batch):  # there is no batched form of this one
            pa, pb, pc = (p(y.data_ptr() + x * y[0, 0].numel() * y.element_size()) for y in (a, b, c))
            self.gemm(*shape, pa, i(inner), pb, ldb, f(0), pc, i(cols))

    def __call__(self):
        import torch

        self.multiply(self.rows, self.k, self.scores, True, self.D**-0.5)
        if self.mask is not None:
            self.scores[..., -self.n :].masked_fill_(~self.mask[:, -self.n :], -torch.inf)
        torch.softmax(self.scores, -1, out=self.scores)
        self.multiply(self.scores.to(self.rows.dtype), self.v, self.out, False, 1.0)
        return unfold(self.out, self.n)


def attention_variants(B, L, n, dtype) -> dict:
    inputs = attention_inputs(B, L, n, dtype)
    q, k_new, v_new, k, v, lengths = inputs
    pack = functools.partial(ops.pack_cache, k, v)
    own = lambda op, *caches: Own(op, q, k_new, v_new, caches, lengths)  # noqa: E731
    makers = {
        "packed": lambda: own(ops.chunked_attention_packed, pack()),
        "rows": lambda: own(ops.chunked_attention, k + 0, v + 0),
        "int8": lambda: own(ops.chunked_attention_packed, pack(jnp.int8)),
        "one_by_one": lambda: OneByOne(q, k_new, v_new, pack(), lengths),
        "torch_folded": lambda: TorchFolded(*folded(q, k, v, k_new, v_new), n),
        "mkl": lambda: MklGemm(*folded(q, k, v, k_new, v_new), n),
        "vllm": _vllm,
        "ref": lambda: own(ops.chunked_attention_ref, k + 0, v + 0) if B * L <= REF_TOKENS else None,
    }
    return {name: attempt(make) for name, make in makers.items() if name == "packed" or not _ONLY.value or name in _ONLY.value}


def _vllm():
    import vllm._C  # noqa: F401

    raise NotImplementedError("this vllm has no CPU attention that could be called here")


def attempt(make):
    """The variant, or None where a peer does not load or does not run."""
    try:
        variant = make()
        if variant is not None:
            variant()
        return variant
    except (ImportError, OSError, AttributeError, NotImplementedError) as e:
        print(f"  not here: {type(e).__name__}: {e}", file=sys.stderr)
        return None


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(variants) -> tuple[dict, dict]:
    """Seconds of each variant per round, and the limits per round; every call finds caches full of something else."""
    seconds = {name: [] for name, v in variants.items() if v is not None}
    limits = {"read_bytes_per_s": [], "fma_flop_per_s": []}
    for _ in range(_ROUNDS.value):
        for name in seconds:
            _ffi.read_bandwidth(FLUSH_BYTES, _THREADS.value)
            seconds[name].append(timed(variants[name]))
        limits["read_bytes_per_s"].append(_ffi.read_bandwidth(2 * FLUSH_BYTES, _THREADS.value))
        limits["fma_flop_per_s"].append(_ffi.fma_peak(_THREADS.value))
    return seconds, limits


def ratios(seconds, own) -> dict:
    return {name: float(np.median(np.divide(s, seconds[own]))) for name, s in seconds.items() if name != own}


def error_of(variants, own) -> dict:
    """Largest difference of each variant's output from the packed kernel's."""
    want = np.asarray(variants[own](), np.float32)
    return {n: float(np.abs(np.asarray(v(), np.float32) - want).max()) for n, v in variants.items() if v is not None and n != own}


def shares(seconds, limits, own, num_bytes, flops) -> dict:
    s, read, fma = (np.asarray(x) for x in (seconds[own], limits["read_bytes_per_s"], limits["fma_flop_per_s"]))
    return {"share_of_read": float(np.median(num_bytes / s / read)), "share_of_fma": float(np.median(flops / s / fma))}


def finish(row, variants, own, num_bytes, flops) -> dict:
    differences = error_of(variants, own)
    seconds, limits = rounds(variants)
    row |= shares(seconds, limits, own, num_bytes, flops)
    row |= {name: float(np.median(x)) for name, x in limits.items()}
    row["ms"] = {name: 1e3 * float(np.median(seconds[name])) if name in seconds else None for name in variants}
    row["min_ms"] = {name: 1e3 * min(s) for name, s in seconds.items()}
    row["times_slower_than_kernel"] = ratios(seconds, own) | {n: None for n, v in variants.items() if v is None}
    row["max_difference"] = differences
    show(row)
    return row


def show(row) -> None:
    slower = "  ".join(f"{n} {'-' if x is None else f'{x:.2f}x'}" for n, x in row["times_slower_than_kernel"].items())
    own = next(iter(row["ms"].values()))
    print(f"{row['case']:34s} {own:9.3f} ms  read {row['share_of_read']:.2f}  fma {row['share_of_fma']:.2f}  {slower}", flush=True)


def attention_rows():
    H, K, D = (int(x) for x in _HEADS.value)
    for dtype in map(jnp.dtype, _DTYPE.value):
        for B, L, n in ((int(b), int(x), int(n)) for b in _B.value for x in _L.value for n in _N.value):
            row = {"case": f"attention {dtype} b={B} l={L} n={n}", "dtype": str(dtype), "batch": B, "length": L, "new_tokens": n}
            num_bytes, flops = 2 * B * K * (L + n) * D * dtype.itemsize, 4 * B * H * n * (L + n) * D
            yield finish(row, attention_variants(B, L, n, dtype), "packed", num_bytes, flops)


def ready(f, *args):
    return jax.block_until_ready(f(*args))


def expert_rows():
    for spec in _EXPERTS.value:
        R, M, F, n = (int(x) for x in spec.split(":"))
        rng = np.random.default_rng(0)
        blocks = jnp.asarray(rng.standard_normal((R, 3, F, M), np.float32) / M**0.5, jnp.bfloat16)
        x = jnp.asarray(rng.standard_normal((n, M), np.float32))
        slots = jnp.asarray([rng.choice(R, 2, replace=False) for _ in range(n)], jnp.int32)
        bits = jax.lax.bitcast_convert_type(blocks, jnp.uint16)
        variants = {
            "kernel": functools.partial(ready, jax.jit(ops.expert_ffn), x, blocks, slots),
            "ref_uint16": functools.partial(ready, jax.jit(ops.expert_ffn_ref), x, bits, slots),
        }
        row = {"case": f"expert_ffn bf16 R={R} M={M} F={F} n={n}", "slots": R, "model": M, "hidden": F, "tokens": n}
        used = len(np.unique(slots))
        yield finish(row, variants, "kernel", used * 6 * F * M, 12 * n * F * M)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if not ops.isas():
        sys.exit("error: the compiled kernels are not usable here; reinstall specmoe_jax with a C++ compiler")
    try:
        import torch

        torch.set_num_threads(_THREADS.value)
    except ImportError:
        pass
    rows = [*attention_rows(), *expert_rows()]
    isa = os.environ.get("SPECMOE_ISA", "auto")
    isa = ops.isas()[0] if isa == "auto" else isa
    print(json.dumps({"isa": isa, "threads": _THREADS.value, "rounds": _ROUNDS.value, "rows": rows}))


if __name__ == "__main__":
    app.run(main)
