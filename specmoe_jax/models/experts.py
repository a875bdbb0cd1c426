"""The feed-forward network of one expert, in every variant that a family has."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.packing import kind_of, packed_bytes, planned, unpack, without_packing
from specmoe_jax.models.packing.kind import Kernel, is_plain
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.ops.products import as_float32, einsum
from specmoe_jax.ops.xla.experts import block_ffn
from specmoe_jax.types import MESH_AXIS, Pool, ShardedPool


def expert_ffn(config: ExpertConfig, x: jax.Array, pool: Pool, slots: jax.Array, *, divided: bool = False) -> jax.Array:
    """Experts pool[slots[i, a]] on x[i], unweighted: x [n, M], pool [R, *block_shape], slots [n, A] -> [n, A, M] float32.

    A slot of -1 gives zeros. pool: or a table of addresses [R, 2] uint32 (`ops.expert_ffn_table`), or slots of several devices.
    divided: of those each gets its equal part of the n outputs, else all.
    """
    if isinstance(pool, ShardedPool):
        return _sharded_ffn(config, x, pool, slots, divided)
    kernel = _kernel(config)
    packed = {} if kernel is None else {"packing": kernel.form, "numbers": kernel.numbers}
    if pool.dtype == jnp.uint32:
        return ops.expert_ffn_table(x, pool, slots, hidden=config.hidden, **packed)
    ffn = None if config.packing is None and is_plain(config) else block_function(config)
    return ops.expert_ffn(x, pool, slots, ffn=ffn, hidden=config.hidden, **packed)


def _sharded_ffn(config: ExpertConfig, x: jax.Array, pool: ShardedPool, slots: jax.Array, divided: bool) -> jax.Array:
    """Every device computes the experts in its own slots. An output is of one device, and zero on all others: the sum is exact."""

    def own(x: jax.Array, blocks: jax.Array, slots: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(MESH_AXIS) * len(blocks)
        here = (slots >= first) & (slots < first + len(blocks))
        outputs = expert_ffn(config, x, blocks, jnp.where(here, slots - first, -1))
        return jax.lax.psum_scatter(outputs, MESH_AXIS, tiled=True) if divided else jax.lax.psum(outputs, MESH_AXIS)

    everywhere, sharded = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(MESH_AXIS)
    specs = {"in_specs": (everywhere, sharded, everywhere), "out_specs": sharded if divided else everywhere}
    each = jax.shard_map(own, mesh=pool.mesh, check_vma=False, **specs)
    return each(x, pool.blocks, slots)


def is_computed_in_place(config: ExpertConfig) -> bool:
    """Whether the compiled kernels compute such experts by their addresses."""
    return is_plain(config) if config.packing is None else _kernel(config) is not None


def _kernel(config: ExpertConfig) -> Kernel | None:
    """What decodes packed experts; None where they are not packed, or it has none."""
    return None if config.packing is None else kind_of(config.packing).kernel(config)


def block_bytes(config: ExpertConfig, dtype: str) -> int:
    """Bytes of one expert in host memory, on the link and in a slot."""
    return config.params * DTYPE_BYTES[dtype] if config.packing is None else packed_bytes(config)


def layer_bytes(config: ModelConfig, dtype: str, expert_dtype: str | None = None) -> tuple[int, ...]:
    """[L], bytes of one expert of each layer that has any; expert_dtype: what a plan packs them as (packing.planned)."""
    return tuple(block_bytes(planned(experts, expert_dtype), dtype) for experts in config.layer_experts)


def mean_bytes(config: ModelConfig, dtype: str, expert_dtype: str | None = None) -> int:
    """Of an expert of any layer, rounded up: layers may be packed differently."""
    return mean(layer_bytes(config, dtype, expert_dtype))


def mean(sizes: Sequence[int]) -> int:
    """Rounded up."""
    return -(-sum(sizes) // len(sizes))


def block_function(config: ExpertConfig):
    """(x [n, M], block) -> [n, M] float32, for one expert; a packed block is unpacked on the way."""
    if config.packing is not None:
        plain = block_function(without_packing(config))
        return lambda x, packed: plain(x, unpack(config, packed))
    if is_plain(config):
        return block_ffn
    return _relu if config.activation == "relu" else functools.partial(_clamped_swiglu, config)


def _relu(x: jax.Array, block: jax.Array) -> jax.Array:
    """NLLB: no gate. The block [2, F + 1, M + 1] is bordered as below."""
    up, down = block[0, :-1], block[1, :, :-1]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1)
    hidden = jax.nn.relu(einsum("nm,fm->nf", x, up))
    return einsum("nf,fm->nm", hidden, down[:-1]) + as_float32(down[-1])


def _clamped_swiglu(config: ExpertConfig, x: jax.Array, block: jax.Array) -> jax.Array:
    """GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), both clamped. The block [3, F + 1, M + 1] is bordered by biases.

    In the last column of gate and up stand theirs, in the last row of down stands its own (homogeneous
    coordinates: x gets a 1 appended), so that an expert stays one array and one copy.
    """
    gate_up, down = block[:2, :-1], block[2, :, :-1]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1)
    gate, up = (einsum("nm,fm->nf", x, matrix) for matrix in gate_up)
    gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
    hidden = (up + 1) * gate * jax.nn.sigmoid(config.alpha * gate)
    return einsum("nf,fm->nm", hidden, down[:-1]) + as_float32(down[-1])
