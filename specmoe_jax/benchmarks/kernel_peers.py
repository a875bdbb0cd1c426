"""Attention of others at the same shapes: PyTorch in its best form, and the paper's way through oneMKL."""

import ctypes
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


def load_mkl():
    # Intel's OpenMP spins for 200 ms after a call, in which whatever is timed next would share the cores with it.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    for file in importlib.metadata.files("mkl") or ():
        if file.name.startswith("libmkl_rt.so"):
            return ctypes.CDLL(str(pathlib.Path(file.locate()).resolve()), mode=ctypes.RTLD_GLOBAL)
    raise ImportError("the mkl wheel has no libmkl_rt")


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
