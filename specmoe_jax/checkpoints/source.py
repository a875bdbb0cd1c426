"""What a conversion reads from: a directory of safetensors or of torch's files, or an Orbax export, behind one face."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from specmoe_jax.checkpoints.conversion import orbax_parts
from specmoe_jax.checkpoints.experts import read_expert, read_weight
from specmoe_jax.checkpoints.files import (
    INDEX_FILE,
    NUMPY_DTYPES,
    PADDING_PREFIX,
    SINGLE_FILE,
    Checkpoint,
    open_checkpoint,
    read_bytes,
)
from specmoe_jax.checkpoints.inventory import Inventory, block_name, canonical_names, check_copies, take_inventory
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.manifest import hash_of
from specmoe_jax.checkpoints.mtp import find_mtp, holds_mtp
from specmoe_jax.checkpoints.published.advice import check_form
from specmoe_jax.checkpoints.published.quantisation import as_stored, check_quantisation
from specmoe_jax.checkpoints.published.torch_files import has_torch_files, open_torch_checkpoint
from specmoe_jax.checkpoints.tensors import TARGET_DTYPES
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.mtp import all_weight_specs
from specmoe_jax.models.spec import TensorSpec, spec_leaves
from specmoe_jax.support.errors import CheckpointError, RequestError

INEXACT = ("F8_E4M3", "I32")  # types of quantised weights, which times their scales bfloat16 does not hold


@dataclasses.dataclass(frozen=True)
class Source:
    """weight: array of a spec. expert: block [3, F, M] of (layer, expert); both finite, in `dtype` or the spec's own.

    Where experts stay packed, `expert` gives their bytes. block: type and shape of what it gives of a layer.
    hash: id of the checkpoint, so that a conversion is not resumed with another. mtp: whether the layer for further tokens is
    there; its experts then follow those of the last layer.
    """

    path: pathlib.Path
    config: ModelConfig
    dtype: str
    hash: str
    weight: Callable[[TensorSpec], np.ndarray]
    expert: Callable[[int, int], np.ndarray]
    block: Callable[[int], tuple[np.dtype, tuple[int, ...]]]
    mtp: bool


def open_source(model: str, dtype: str | None, *, decode: bool = False) -> Source:
    """The source of a directory or bundled model; what it is stands in its files, not in its name. Raises CheckpointError.

    decode: has packed experts decoded.
    """
    if dtype is not None and dtype not in TARGET_DTYPES:
        raise RequestError(f"dtype is {dtype!r}; it must be one of {', '.join(TARGET_DTYPES)}")
    path = checkpoint_path(model)
    if (path / orbax_parts.DESCRIPTION_FILE).exists():
        return _orbax_source(path, dtype)
    check_form(path, torch_files=True)
    is_safetensors = (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists()
    read = open_torch_checkpoint if has_torch_files(path) and not is_safetensors else open_checkpoint
    return _source(path, read(path), dtype, decode)


def _source(path: pathlib.Path, checkpoint: Checkpoint, dtype: str | None, decode: bool) -> Source:
    config = load_config(path)
    check_quantisation(path, config, checkpoint)
    config = as_stored(path, config, checkpoint)
    inventory, dtype = take_inventory(config, checkpoint), dtype or _stored_dtype(config, checkpoint)
    check_copies(inventory)
    mtp = holds_mtp(config, checkpoint)
    if mtp:
        further = find_mtp(path, config, checkpoint)
        inventory = Inventory(weights=inventory.weights | further.weights, experts=inventory.experts + further.experts)

    @functools.lru_cache(maxsize=1)  # the Hugging Face layout asks for the three matrices of an expert one by one
    def expert(layer: int, expert: int) -> np.ndarray:
        source = inventory.experts[layer][expert]._replace(decode=decode)
        block = read_expert(source, dtype, check_finite=True)
        return block if source.stays_packed else block.view(TARGET_DTYPES[dtype])

    def block(layer: int) -> tuple[np.dtype, tuple[int, ...]]:
        source = inventory.experts[layer][0]._replace(decode=decode)
        return np.dtype(np.uint8) if source.stays_packed else TARGET_DTYPES[dtype], source.block_shape

    return Source(
        path=path,
        config=config.with_packing(None) if decode else config,
        dtype=dtype,
        hash=hash_of(checkpoint),
        weight=lambda spec: read_weight(inventory.weights[spec.name], spec.in_dtype(dtype), check_finite=True),
        expert=expert,
        block=block,
        mtp=mtp,
    )


def _orbax_source(path: pathlib.Path, dtype: str | None) -> Source:
    stored, hashes = orbax_parts.read_description(path)
    config = load_config(path).with_packing(None)
    part = functools.lru_cache(maxsize=1)(lambda index: orbax_parts.verified(path, index, hashes))

    def array(index: int, name: str, keep: str | None = None) -> np.ndarray:
        arrays = part(index)
        if name not in arrays:
            raise CheckpointError(f"{orbax_parts.part_name(index, 0)}: tensor {name}: missing that config.json asks for")
        return arrays[name].astype(TARGET_DTYPES[keep or dtype or stored])

    return Source(
        path=path,
        config=config,
        dtype=dtype or stored,
        hash=hashlib.sha256(read_bytes(path / orbax_parts.DESCRIPTION_FILE)).hexdigest(),
        weight=lambda spec: array(0, spec.name, spec.keep),
        expert=lambda layer, expert: array(layer + 1, block_name(layer, expert)),
        block=lambda layer: (TARGET_DTYPES[dtype or stored], config.experts.block_shape),
        mtp=config.mtp_layers > 0 and block_name(config.num_expert_layers, 0) in hashes,
    )


def all_specs(config: ModelConfig, *, mtp: bool) -> list[TensorSpec]:
    """Of everything but the experts; mtp: those of the layer for further tokens, too."""
    return spec_leaves(family_of(config).weight_specs(config)) + (spec_leaves(all_weight_specs(config)) if mtp else [])


def _stored_dtype(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """The narrowest compute dtype that loses nothing of what is stored (of float64, which no model needs, it does)."""
    canonical = canonical_names(config, checkpoint)
    kept = {spec.name for spec in all_specs(config, mtp=config.mtp_layers > 0) if spec.keep}
    weights = (t for name, t in checkpoint.tensors.items() if not name.startswith(PADDING_PREFIX))
    names = {t.entry.dtype for t in weights if canonical(t.entry.name) not in kept}
    exact = names.intersection((*NUMPY_DTYPES, *INEXACT)) == {"BF16"}
    return "bfloat16" if exact else "float32"
