"""The kernels inside JAX: donation, scan, vmap, many calls in one program, the fallback and its one warning."""

import functools
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.ops.cpu import _ffi
from tests.ops.oracle import make_case


def test_donated_caches_are_updated_in_place(kernels):
    *new, k, v, lengths = make_case(1, 2, 2, 4, 2, 32, 64).args
    before = k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()
    step = jax.jit(ops.chunked_attention, donate_argnums=(3, 4))
    _, k, v = step(*new, k, v, lengths)
    assert (k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()) == before


def test_a_donated_packed_cache_is_updated_in_place(kernels):
    *new, k, v, lengths = make_case(1, 2, 2, 4, 2, 32, 64).args
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        cache = ops.pack_cache(k, v, dtype)
        before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache) if x.size]
        _, cache = jax.jit(ops.chunked_attention_packed, donate_argnums=3)(*new, cache, lengths)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache) if x.size] == before


def test_without_donation_the_arguments_stay(kernels):
    args = make_case(2, 2, 2, 4, 2, 32, 64).args
    k = np.array(args[3])
    _, k_after, _ = jax.jit(ops.chunked_attention)(*args)
    np.testing.assert_array_equal(args[3], k)
    assert (np.asarray(k_after) != k).any()


def test_in_a_scan(kernels):
    *new, k, v, lengths = make_case(3, 2, 3, 4, 2, 32, 64, lengths=[0, 5]).args

    def body(carry, _):
        k, v, lengths = carry
        out, k, v = ops.chunked_attention(*new, k, v, lengths)
        return (k, v, lengths + 3), out

    (k_scan, _, _), outs = jax.jit(lambda c: jax.lax.scan(body, c, length=4))((k, v, lengths))
    carry = (k, v, lengths)
    for i in range(4):
        carry, out = body(carry, None)
        np.testing.assert_array_equal(out, outs[i])
    np.testing.assert_array_equal(carry[0], k_scan)


def test_under_vmap(kernels):
    cases = [make_case(s, 2, 3, 4, 2, 32, 64).args for s in (4, 5)]
    stacked = [jnp.stack(x) for x in zip(*cases, strict=True)]
    outs, _, _ = jax.jit(jax.vmap(lambda *a: ops.chunked_attention(*a)))(*stacked)
    for case, out in zip(cases, outs, strict=True):
        np.testing.assert_array_equal(ops.chunked_attention(*case)[0], out)


CANARY = """
import jax, jax.numpy as jnp
from specmoe_jax import ops
q, new, cache = jnp.ones((2, 2, 4, 16)), jnp.ones((2, 2, 2, 16)), jnp.ones((2, 2, 40, 16))
lengths = jnp.array([7, 30], jnp.int32)
x, blocks, slots = jnp.ones((3, 16)), jnp.ones((4, 3, 24, 16)), jnp.arange(6, dtype=jnp.int32).reshape(3, 2) % 4
def program(q, x):
    for i in range(8):  # independent chains, so that XLA may run handlers on pool workers at the same time
        a, _, _ = ops.chunked_attention(q + i, new, new, cache, cache, lengths)
        y = ops.expert_ffn(x + i, blocks, slots)
        q, x = q + 0 * a, x + 0 * y[:, 0]
    return q @ jnp.ones((16, 16)), x
step = jax.jit(program)
for _ in range(200):
    jax.block_until_ready(step(q, x))
print("done")
"""


@pytest.mark.slow
def test_no_deadlock_in_200_runs_of_16_calls(kernels):
    done = subprocess.run([sys.executable, "-c", CANARY], timeout=300, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr[-2000:]


FALLBACK = """
import warnings, sys
import jax, jax.numpy as jnp
{break_it}
from specmoe_jax import ops
new, cache = jnp.ones((1, 2, 1, 8)), jnp.ones((1, 1, 9, 8))
args = jnp.ones((1, 2, 2, 8)), new, new, cache, cache, jnp.array([3], jnp.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ops.chunked_attention(*args)
        ops.expert_ffn(jnp.ones((1, 8)), jnp.ones((2, 3, 8, 8)), jnp.array([[0]], jnp.int32))
        ops.chunked_attention_packed(*args[:3], ops.pack_cache(cache, cache), args[5])
print(len([w for w in caught if "specmoe_jax.ops" in str(w.message)]), [str(w.message) for w in caught][:1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "newer", "ref"])
def test_the_fallback_warns_once(how):
    break_it = {
        "missing": "sys.modules['specmoe_jax._cpu_ops'] = None",
        "newer": "import types; m = sys.modules['specmoe_jax._cpu_ops'] = types.ModuleType('m'); m.ffi_api = (0, 99)",
        "ref": "",
    }[how]
    env = dict(os.environ, SPECMOE_CPU_OPS="ref" if how == "ref" else "auto")
    code = FALLBACK.format(break_it=break_it)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200)
    assert done.stdout.startswith("0" if how == "ref" else "1"), done.stdout + done.stderr[-2000:]
    if how == "newer":
        assert "built for XLA FFI 0.99" in done.stdout


def test_an_older_build_is_accepted_and_a_newer_refused():
    runtime = _ffi.runtime_api()
    _ffi.check_api(runtime, runtime)
    _ffi.check_api((runtime[0], runtime[1] - 1), runtime)
    for built in ((runtime[0], runtime[1] + 1), (runtime[0] + 1, 0)):
        with pytest.raises(_ffi.Unusable):
            _ffi.check_api(built, runtime)


def test_an_unknown_instruction_set_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("SPECMOE_ISA", "sse9")
    with pytest.raises(ValueError, match="SPECMOE_ISA is 'sse9'; this machine has auto"):
        ops.chunked_attention(*make_case(1, 1, 1, 1, 1, 8, 16).args)


def test_no_warning_in_ordinary_use(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(jax.jit(functools.partial(ops.chunked_attention, window=4))(*make_case(1, 1, 1, 1, 1, 8, 16).args))
