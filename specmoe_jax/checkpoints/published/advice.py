"""A directory that holds a model in another form than is loaded: the advice that helps, before any other complaint."""

import os
import pathlib

from specmoe_jax.checkpoints.files import GGUF_TABLE, INDEX_FILE, SINGLE_FILE
from specmoe_jax.checkpoints.published.torch_files import has_torch_files
from specmoe_jax.support.errors import CheckpointError

CONVERT = "specmoe convert --model={} --output=NEW_DIR --format=specmoe"
VOCABULARIES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json")


def check_form(path: pathlib.Path, *, torch_files: bool = False) -> None:
    """Raises CheckpointError for a directory whose weights have to be converted first. torch_files: those are taken.

    A directory without any weights passes: what is missing is told by whoever looks for it.
    """
    if any(os.path.lexists(path / name) for name in (SINGLE_FILE, INDEX_FILE, GGUF_TABLE)):
        return
    if has_torch_files(path) or (found := _first(path, "*.bin", "*.pt", "*.pth")):
        name = "pytorch_model*.bin" if has_torch_files(path) else found.name
        if not has_torch_files(path):
            raise CheckpointError(
                f"{path}: {name} is torch's format under a name of its own; expected model.safetensors or pytorch_model.bin: "
                "load it with the library that wrote it and save it with save_pretrained"
            )
        if not torch_files:
            raise CheckpointError(
                f"{path}: its weights are {name}, which are converted once: {CONVERT.format(path)} (needs pip install "
                "specmoe_jax[torch])"
            )
    elif found := _first(path, "*.safetensors"):
        raise CheckpointError(f"{path}: has {found.name}, but neither {SINGLE_FILE} nor {INDEX_FILE}: is the download complete?")


def tokenizer_advice(path: pathlib.Path | None) -> str | None:
    """How to get tokenizer.json where a directory has its vocabulary in another form; None where it has none."""
    found = next((name for name in VOCABULARIES if path is not None and (path / name).exists()), None)
    if found is None:
        return None
    needed = "transformers" if found == "vocab.json" else "transformers sentencepiece"
    return (
        f'{path}: has {found} but no tokenizer.json; make it once: pip install {needed}, then python -c "from transformers import '
        f"AutoTokenizer as A; A.from_pretrained('{path}').save_pretrained('{path}')\""
    )


def _first(path: pathlib.Path, *patterns: str) -> pathlib.Path | None:
    return next((file for pattern in patterns for file in sorted(path.glob(pattern))), None)
