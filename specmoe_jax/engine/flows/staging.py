"""Where the prompts of one pass attend on the accelerator: rows of one layer's keys and values, while its chunks go by."""

import collections

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.engine import stages
from specmoe_jax.kv_cache.positions import CHUNKS_AHEAD
from specmoe_jax.support.processes import put


class Staging:
    """positions: S of the rows. Layers of one shape share them, one after the other, by donation; nothing outlives the pass."""

    def __init__(self, positions: int):
        self._positions = positions
        self._rows: dict[tuple[int, ...], tuple[jax.Array, jax.Array]] = {}
        self._ahead: collections.deque[jax.Array] = collections.deque()

    def attend(self, config: LayerConfig, projected, lengths: jax.Array, num_new: jax.Array) -> jax.Array:
        """projected: q, k, v and sinks of a chunk [b, T, ...]; the chunks of a layer come in their order. -> [b, T, H, D].

        Waits for what was issued CHUNKS_AHEAD calls ago: else a long prefill is issued, and allocated, all at once.
        """
        if len(self._ahead) == CHUNKS_AHEAD:
            jax.block_until_ready(self._ahead.popleft())
        k = projected[1]
        shape = (len(k), config.attention.num_kv_heads, self._positions, config.attention.cache_dim)
        if shape not in self._rows:  # put where k is, as all later rows are: else the second chunk's program is another one
            self._rows[shape] = tuple(put(jnp.zeros(shape, k.dtype), k.sharding) for _ in range(2))
        out, *rows = stages.attend_chunk(config, *projected, *self._rows[shape], lengths, num_new)
        self._rows[shape] = tuple(rows)
        self._ahead.append(out)
        return out
