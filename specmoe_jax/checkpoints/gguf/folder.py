"""A GGUF file as a checkpoint directory: small files in the cache, made of its metadata once; its tensors stay where they are.

Everything that reads a checkpoint (jobs, chats, explanations, conversions) then finds config.json, the tokenizer and a table of
tensors, and the seconds that the package takes to parse a real vocabulary are spent once a file.
"""

import atexit
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

from specmoe_jax.checkpoints.files import GGUF_TABLE, INDEX_FILE, OWN_METHOD, SINGLE_FILE
from specmoe_jax.checkpoints.gguf import names
from specmoe_jax.checkpoints.gguf.config import config_json, generation_config, packing_of
from specmoe_jax.checkpoints.gguf.metadata import SPLIT, parts_of, read
from specmoe_jax.checkpoints.gguf.vocabulary import write_side_files
from specmoe_jax.checkpoints.header import quote_list
from specmoe_jax.support.cache_files import cache_folder
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.version import __version__

FORM = 1  # of what is written; another one is made anew
PROJECTOR = "mmproj"  # what the names of files with a vision tower begin with


def gguf_in(path: pathlib.Path) -> pathlib.Path | None:
    """The GGUF model of a directory that holds no safetensors; None without. Raises CheckpointError where there are several."""
    if any(os.path.lexists(path / name) for name in (SINGLE_FILE, INDEX_FILE, GGUF_TABLE)):
        return None
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith(PROJECTOR))
    firsts = {(match[1] if (match := SPLIT.fullmatch(file.name)) else file.name): file for file in reversed(files)}
    if len(firsts) > 1:
        raise CheckpointError(
            f"{path}: holds several models, {quote_list(sorted(f.name for f in firsts.values()))}; give the path of one"
        )
    return next(iter(firsts.values()), None)


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """The directory that stands for a GGUF file, made if it is not there yet. Raises CheckpointError, RequestError."""
    try:
        parts = [part.resolve() for part in parts_of(path)]
        facts = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    folder = cache_folder() / "gguf" / hashlib.sha256(repr((FORM, __version__, facts)).encode()).hexdigest()[:24]
    if (folder / GGUF_TABLE).exists():
        return folder
    file = read(parts[0])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError:  # a read-only home: for this process alone
        made = folder = pathlib.Path(tempfile.mkdtemp(prefix="specmoe-gguf-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        _fill(made, file)
        return folder if made == folder else _placed(made, folder)
    finally:
        if made != folder:
            shutil.rmtree(made, ignore_errors=True)


def _fill(folder: pathlib.Path, file) -> None:
    config, table = config_json(file), names.rows(file)
    if packing := packing_of(file, table):
        config |= {"quantization_config": {"quant_method": OWN_METHOD, "packing": packing}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation_config(file), indent=2))
    if "tokenizer.ggml.tokens" in file.fields:
        write_side_files(file, folder)
    (folder / GGUF_TABLE).write_text(json.dumps({"name": file.name, "tensors": table}))


def _placed(made: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Under its own name; another process may have been first, which made the same."""
    try:
        made.chmod(0o755)
        made.rename(folder)
    except OSError:
        if not (folder / GGUF_TABLE).exists():
            raise
    return folder
