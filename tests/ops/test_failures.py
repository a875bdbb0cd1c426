"""What goes wrong inside a compiled kernel reaches Python as one error, and the next call works."""

import subprocess
import sys

import pytest

# 256 MB of hidden units for 16 KB of results: beyond a limit that leaves XLA what it needs.
EXPERTS = """
x, blocks, slots = jnp.ones((2000, 8)), jnp.ones((1, 3, 32768, 8)), jnp.zeros((2000, 1), jnp.int32)
op, big, small = ops.expert_ffn, (x, blocks, slots), (x[:8], blocks, slots[:8])
"""
# 64 new tokens of 4,096 query heads on each of a few cache heads: the queries of one head are copied for their register tiles.
ATTENTION = """
new = jnp.ones((1, 64, 1, 512))
big = jnp.ones((1, 64, 4096, 512)), new, new, jnp.ones((1, 1, 80, 512)), jnp.ones((1, 1, 80, 512)), jnp.array([3], jnp.int32)
op, small = ops.chunked_attention, (big[0][:, :1, :8], *(x[:, :1] for x in big[1:3]), *big[3:])
"""
RUN = """
import resource
import jax, jax.numpy as jnp
from specmoe_jax import ops
{inputs}
run_big, run_small = (jax.jit(op).lower(*args).compile() for args in (big, small))
jax.block_until_ready(run_small(*small))
pages = int(open("/proc/self/statm").read().split()[0])
free = sum(x.size * 4 for x in big[:1]) + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + free, -1))
for _ in range(2):
    try:
        jax.block_until_ready(run_big(*big))
        print("no error")
    except Exception as e:
        print(str(e).splitlines()[0])
jax.block_until_ready(run_small(*small))
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
@pytest.mark.parametrize("inputs, op", [(EXPERTS, "expert_ffn"), (ATTENTION, "chunked_attention")], ids=["experts", "attention"])
def test_no_memory_for_scratch_is_an_error_and_not_the_end(kernels, inputs, op):
    done = subprocess.run([sys.executable, "-c", RUN.format(inputs=inputs)], timeout=300, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "done", done.stdout + done.stderr[-2000:]
    assert all(f"{op}: out of host memory" in line for line in lines[:2]), lines
