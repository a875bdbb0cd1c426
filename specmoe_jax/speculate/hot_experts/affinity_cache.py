"""The affinity table of a checkpoint, computed once and kept on disk under the checkpoint's hash."""

import functools
import hashlib
import pathlib

import numpy as np

from specmoe_jax.checkpoints.manifest import model_hash
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.config.model_config import LAYERS
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing import unpacked
from specmoe_jax.speculate.hot_experts.affinity import expert_distances, load_table, neighbours, save_table
from specmoe_jax.support.cache_files import cache_folder
from specmoe_jax.support.processes import agreed_bytes, is_first, several
from specmoe_jax.support.progress import bar


def affinity_table(model: Model, *, progress: str | bool = False) -> np.ndarray:
    """[L, E, E] int32: for each expert the others by L2 distance, nearest first (SpecMoE, affinity).

    Loaded if an earlier run saved it; a damaged table is computed again. A model that is not a checkpoint's
    (random weights) has no hash and is not cached. A cache that cannot be written is skipped. Of several processes the first one's
    is everybody's: distances may be rounded differently elsewhere.
    progress: a bar of layers, a mode of progress.bar.
    """
    shape = model.config.num_moe_layers, model.config.num_experts
    table = _own_table(model, shape, progress) if is_first() else np.zeros((*shape, shape[1]), np.int32)
    return np.frombuffer(agreed_bytes(table.tobytes()), np.int32).reshape(table.shape) if several() else table


def _own_table(model: Model, shape: tuple[int, int], progress: str | bool) -> np.ndarray:
    path = _table_path(model)
    if path is not None:
        try:
            return load_table(path, *shape)
        except (OSError, ValueError):
            pass
    table = _compute(model, progress)
    if path is not None:
        _save(path, table)
    return table


def _table_path(model: Model) -> pathlib.Path | None:
    """Of its own for each dtype and packing, whose rounding may change who is nearer."""
    if model.path is None:
        return None
    packing = model.config.packing
    if packing is not None and LAYERS in packing:  # a name for each layer is too long for one of a file
        packing = hashlib.sha256(packing.encode()).hexdigest()[:12]
    kind = "-".join(filter(None, (model.dtype, packing)))
    return cache_folder() / "affinity" / f"{model_hash(model)}-{kind}.npz"


def _compute(model: Model, progress: str | bool) -> np.ndarray:
    table, count = [], model.config.num_moe_layers  # what an encoder has behind them is not drafted with
    with bar("affinity", count, "layer", mode=progress) as shown:
        for config, blocks in zip(model.config.layer_experts, (model.experts[layer] for layer in range(count)), strict=False):
            table.append(neighbours(expert_distances(functools.partial(_weights, config, blocks), len(blocks))))
            shown.update()
    return np.stack(table)


def _weights(config: ExpertConfig, blocks, expert: int) -> np.ndarray:
    return unpacked(config, np.asarray(blocks[expert]))


def _save(path: pathlib.Path, table: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(path, table)
    except OSError:  # read-only home, full disk: the next run computes it again
        pass
