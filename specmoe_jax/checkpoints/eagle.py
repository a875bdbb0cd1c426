"""A directory with an EAGLE head -> EagleHead: every tensor expected, none left over (other engines lose fc.bias silently)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.checkpoints.files import SINGLE_FILE, Checkpoint, StoredTensor, open_checkpoint, read_json
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.checkpoints.published.names import Names
from specmoe_jax.checkpoints.published.torch_files import has_torch_files, open_torch_checkpoint
from specmoe_jax.checkpoints.tensors import read_tensor
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.config import EagleConfig, EagleWeights
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import TensorSpec, map_specs
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.jax_settings import lenient

EMBEDDING = "embed_tokens.weight"
INTEGERS = {"I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
BUNDLED_HEADS = {name: path / "eagle" for name, path in BUNDLED.items()}


def bundled_head(model: str) -> str | None:
    """The name of the head that is bundled with a bundled model; None where there is none."""
    return model if model in BUNDLED_HEADS and BUNDLED_HEADS[model].is_dir() else None


@lenient()
def load_head(path_or_name: str, model: Model) -> EagleHead:
    """The head in "demo" (bundled, of the bundled model) or in a directory with config.json and *.safetensors.

    The names are those of the published files (EAGLE-1 and -2: yuhuili/EAGLE-*; EAGLE-3: SpecForge's midlayer, layers.0 of vLLM
    and speculators); torch's own files are read where torch is installed. A file that holds the embedding as well must hold the
    model's own. The head computes in the model's dtype and borrows its embedding and output matrix. Raises CheckpointError, one
    line that names file and tensor.
    """
    path = head_path(path_or_name)
    checkpoint = _open(path)
    config = _config(read_json(path / "config.json"), checkpoint, model.config)
    fused = config.fused
    names = Names(checkpoint, canonical=lambda name: eagle_config.canonical_name(name, fused=fused))
    stored = map_specs(names.take, eagle_config.weight_specs(config))
    tables = _tables(names, config, model.config.vocab_size) if config.fused else None
    embedding = names.take(_embedding_spec(model)) if names.has(EMBEDDING) else None
    names.raise_if_missing()
    names.raise_if_unused()
    if embedding is not None:
        _check_embedding(embedding, model)
    weights = _read(stored, model.dtype)
    if config.draft_vocab_size is not None:
        ids = np.arange(config.draft_vocab_size, dtype=np.int32)
        table = ids if tables is None else _to_target(tables["d2t"], tables["t2d"], model.config.vocab_size)
        weights = dataclasses.replace(weights, to_target=jnp.asarray(table))
    return eagle.attach(config, weights, model)


def head_config(path_or_name: str, target: ModelConfig) -> EagleConfig:
    """Sizes and format of a head for a target, from config.json and the names of the tensors alone. Raises CheckpointError."""
    path = head_path(path_or_name)
    raw, checkpoint = read_json(path / "config.json"), _open(path)
    return _config(raw, checkpoint, target)


def _config(raw: dict, checkpoint: Checkpoint, target: ModelConfig) -> EagleConfig:
    try:
        return eagle_config.parse_config(raw, target, fused=eagle_config.is_fused(checkpoint.tensors))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as e:
        raise CheckpointError(f"config.json: a value of the wrong kind ({str(e)[:100]})") from e


def _open(path: pathlib.Path) -> Checkpoint:
    """Safetensors, or torch's files, which most EAGLE-1 heads are published as and which are small."""
    return open_torch_checkpoint(path) if has_torch_files(path) and not (path / SINGLE_FILE).exists() else open_checkpoint(path)


def head_path(path_or_name: str) -> pathlib.Path:
    """The directory of a bundled head or of a path. Raises CheckpointError when there is none."""
    path = BUNDLED_HEADS.get(path_or_name) or pathlib.Path(path_or_name).expanduser()
    try:
        found = path.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise CheckpointError(
            f"draft head {quote(str(path_or_name))}: no such directory; give {' or '.join(BUNDLED_HEADS)} or a directory with "
            "config.json and model.safetensors or pytorch_model.bin"
        )
    return path


def _read(stored, dtype: str) -> EagleWeights[jax.Array]:
    def read(tensor: StoredTensor) -> jax.Array:
        return jax.device_put(read_tensor(tensor, dtype, check_finite=True))

    return jax.tree.map(read, stored, is_leaf=lambda leaf: isinstance(leaf, StoredTensor))


def _embedding_spec(model: Model) -> TensorSpec:
    return TensorSpec(EMBEDDING, model.weights.embed.shape)


def _check_embedding(tensor: StoredTensor, model: Model) -> None:
    """The head's copy is the model's, up to its rounding to half precision (2^-9 of a value, 1e-6 where that is subnormal)."""
    own = read_tensor(tensor, "float32", check_finite=True)
    models = np.asarray(model.weights.embed, np.float32)
    far = np.abs(own - models) > 2.0**-8 * np.abs(models) + 1e-6
    if far.any():
        raise CheckpointError(
            f"{tensor.where}: {int(far.any(axis=1).sum())} of {len(own)} rows are not the model's: this head is of another model"
        )


def _tables(names: Names, config: EagleConfig, vocab_size: int) -> dict[str, StoredTensor] | None:
    """d2t and t2d, by name and shape; neither where the head has the whole vocabulary and the file leaves them out."""
    if config.draft_vocab_size == vocab_size and not (names.has("d2t") or names.has("t2d")):
        return None
    assert config.draft_vocab_size is not None  # an EAGLE-3 head
    specs = TensorSpec("d2t", (config.draft_vocab_size,)), TensorSpec("t2d", (vocab_size,))
    return names.take_all(specs, types=tuple(INTEGERS))


def _to_target(d2t: StoredTensor, t2d: StoredTensor, vocab_size: int) -> np.ndarray:
    """[V'] int32: draft id plus offset. The mask says the same, or the file is damaged."""
    ids = np.arange(d2t.entry.shape[0]) + _integers(d2t)
    if ((ids < 0) | (ids >= vocab_size)).any() or len(np.unique(ids)) < len(ids):
        raise CheckpointError(f"{d2t.where}: draft ids plus offsets are not different ids of 0..{vocab_size - 1}")
    if not np.array_equal(np.flatnonzero(_integers(t2d)), np.sort(ids)):
        raise CheckpointError(f"{t2d.where}: marks other tokens than d2t leads to")
    return ids.astype(np.int32)


def _integers(tensor: StoredTensor) -> np.ndarray:
    content = b"".join(tensor.read_steps(0, tensor.entry.bytes, 1 << 20))
    return np.frombuffer(content, INTEGERS[tensor.entry.dtype])
