"""Float64 attention in plain loops, and random cases, for the tests of the attention kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops

EPS = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Case:
    """Row-layout arguments of chunked_attention and its options."""

    args: tuple  # q, k_new, v_new, k_cache, v_cache, lengths
    options: dict

    @property
    def shape(self):
        B, T, H, D = self.args[0].shape
        return B, T, H, self.args[1].shape[2], self.args[3].shape[2], D


def make_case(seed, B, T, H, K, D, S, *, cache=jnp.float32, query=jnp.float32, tree=False, lengths=None, **options) -> Case:
    rng = np.random.default_rng(seed)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    lengths = rng.integers(0, max(S - T, 0) + 1, size=B) if lengths is None else lengths
    if tree:
        options["tree_mask"] = jnp.asarray(np.tril(rng.random((B, T, T)) < 0.5) | np.eye(T, dtype=bool))
    news = draw(query, B, T, H, D), draw(query, B, T, K, D), draw(query, B, T, K, D)
    caches = draw(cache, B, K, S, D), draw(cache, B, K, S, D)
    return Case((*news, *caches, jnp.asarray(lengths, jnp.int32)), options)


def run(case: Case, op=None):
    """Jitted anew each time: what the environment forces is read at trace time."""
    return jax.jit(functools.partial(op or ops.chunked_attention, **case.options))(*case.args)


def run_packed(case: Case, dtype=None):
    q, k_new, v_new, k_cache, v_cache, lengths = case.args
    cache = ops.pack_cache(k_cache, v_cache, dtype)
    call = functools.partial(ops.chunked_attention_packed, **case.options)
    return jax.jit(call)(q, k_new, v_new, cache, lengths)


def mask64(case: Case) -> np.ndarray:
    """[B, T, S] what each new token attends, told token by token."""
    B, T, _, _, S, _ = case.shape
    lengths = np.asarray(case.args[5])
    num_new = np.broadcast_to(np.asarray(case.options.get("num_new", T)), (B,))
    tree, window = case.options.get("tree_mask"), case.options.get("window")
    tree = np.tril(np.ones((T, T), bool)) if tree is None else np.asarray(tree)
    tree = np.broadcast_to(tree, (B, T, T))
    mask = np.zeros((B, T, S), bool)
    for b in range(B):
        n, length = num_new[b], lengths[b]
        depth = [max(tree[b, t, :n].sum() - 1, 0) for t in range(n)]
        for t in range(n):
            near = lambda d, t=t, depth=depth: not window or d > depth[t] - window  # noqa: E731
            for s in range(min(length, S)):
                mask[b, t, s] = near(s - length)
            for c in range(min(n, S - length)):
                mask[b, t, length + c] = tree[b, t, c] and near(depth[c])
    return mask


def attend64(case: Case, k, v) -> tuple[np.ndarray, float, float]:
    """(out [B, T, H, D], largest |logit|, largest |V|) over stored caches k, v [B, K, S, D] after the append."""
    B, T, H, K, _, D = case.shape
    q, mask = np.asarray(case.args[0], np.float64), mask64(case)
    scale = case.options.get("scale") or D**-0.5
    cap = case.options.get("softcap")
    out, top_logit, top_v = np.zeros((B, T, H, D)), 0.0, 0.0
    for b, t, h in np.ndindex(B, T, H):
        at = np.flatnonzero(mask[b, t])
        if not len(at):
            continue
        keys, values = np.asarray(k[b, h // (H // K), at], np.float64), np.asarray(v[b, h // (H // K), at], np.float64)
        logits = scale * (keys @ q[b, t, h])
        top_logit, top_v = max(top_logit, np.abs(logits).max()), max(top_v, np.abs(values).max())
        if cap:
            logits = cap * np.tanh(logits / cap)
        p = np.exp(logits - logits.max())
        out[b, t, h] = p @ values / p.sum()
    return out, top_logit, top_v


def assert_accurate(case: Case, out, k, v) -> None:
    """max error <= 4 * 2^-24 * (1 + max |logit|) * max |V|, plus half an ulp where the output is bfloat16."""
    want, top_logit, top_v = attend64(case, np.asarray(k, np.float32), np.asarray(v, np.float32))
    tolerance = 4 * EPS * (1 + top_logit) * top_v
    if out.dtype == jnp.bfloat16:
        tolerance = tolerance + 2.0**-8 * np.abs(want)
    error = np.abs(np.asarray(out, np.float64) - want)
    assert np.all(error <= tolerance), f"error {error.max()} beyond {np.max(tolerance)}"
