"""What would fail where accelerator and host are two devices, found without an accelerator."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import SAMPLED, plan, run

from specmoe_jax import ops
from specmoe_jax.offload import store
from specmoe_jax.testing import tiny

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.mark.slow
def test_no_program_mixes_the_devices_and_no_copy_is_implicit():
    script = pathlib.Path(__file__).with_name("two_devices.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ | TWO_DEVICES, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = json.loads(done.stdout.splitlines()[-1])
    greedy, sampled = (run(tiny(), plan("resident", batch_size=8), **how)[0] for how in ({}, {"params": SAMPLED}))
    assert len(tokens) == 12
    for name, got in tokens.items():
        assert [tuple(row) for row in got] == (sampled if name == "sampled" else greedy), name


def test_lowered_for_cuda_the_kernels_are_their_jnp_forms():
    """No handler is registered for CUDA: a call of one would fail when the program is compiled there."""
    block, x, slots = jnp.zeros((2, 3, 8, 16), jnp.bfloat16), jnp.zeros((4, 16)), jnp.zeros((4, 2), jnp.int32)
    new, cache, ints = jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 2, 16, 8)), jnp.zeros(1, jnp.int32)
    calls = (
        (ops.expert_ffn, (x, block, slots)),
        (ops.chunked_attention, (new, new, new, cache, cache, ints)),
        (ops.chunked_attention_packed, (new, new, new, ops.empty_cache(1, 2, 16, 8), ints)),
    )
    for op, args in calls:
        traced = jax.jit(op).trace(*args)
        assert ("specmoe_" in traced.lower().as_text()) == bool(ops.isas())
        assert "specmoe_" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_slot_write_can_be_lowered_for_cuda_from_pinned_memory():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    block = jax.device_put(np.zeros((3, 8, 16), np.float32), sharding)
    traced = store._write_slots.trace(jnp.zeros((2, 3, 8, 16)), (block, block), np.zeros(2, np.int32))
    assert "annotate_device_placement" in traced.lower(lowering_platforms=("cuda",)).as_text()
