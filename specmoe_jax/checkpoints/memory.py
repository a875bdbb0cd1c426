"""Whether the weights fit into host memory, asked before the first of them is read."""

import os

from specmoe_jax.checkpoints.experts import is_mappable
from specmoe_jax.checkpoints.inventory import Inventory
from specmoe_jax.checkpoints.tensors import TARGET_DTYPES
from specmoe_jax.models.model import PINNED_LIMIT
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.host_memory import available_bytes


def weight_bytes(inventory: Inventory, dtype: str) -> int:
    """Bytes that a load puts into memory: everything in the compute dtype but experts that stay packed or are mapped."""
    weights = TARGET_DTYPES[dtype].itemsize * sum(weight.size for weight in inventory.weights.values())
    read = (source for layer in inventory.experts for source in layer if not is_mappable(source, dtype))
    return weights + sum(source.block_bytes(dtype) for source in read)


def raise_pinned_limit() -> None:
    """Lets XLA's pool of pinned memory on a GPU, which ends at 64 GB, take three quarters of what is free.

    The user's own value stays. To be called before JAX starts. Not all of it: the pool grows in regions that double, up to its
    limit, whatever is in use.
    """
    available = available_bytes()
    if available is not None:
        os.environ.setdefault(PINNED_LIMIT, str(max(available * 3 // 4 >> 30, 1)))


def check_memory(inventory: Inventory, dtype: str, model: str) -> None:
    """Raises CheckpointError when the weights cannot fit, with what would."""
    needed, available = weight_bytes(inventory, dtype), available_bytes()
    if available is None or needed <= available:
        return
    smaller = "dtype bfloat16 takes half; " if dtype == "float32" else ""
    raise CheckpointError(
        f"{model}: weights of {needed / 1e9:.1f} GB in {dtype}, but {available / 1e9:.1f} GB of host memory are free;"
        f" {smaller}specmoe convert --format=specmoe gives a form that is mapped from disk"
    )
