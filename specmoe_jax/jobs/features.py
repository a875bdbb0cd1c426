"""Hidden states of many texts as files, shard by shard: a run that is stopped goes on with the shards that are missing.

A folder holds features.json, which says what it is of, and shards with the texts in their order: `token_ids` [n] of all texts of
the shard in a row, `starts` [texts + 1] where each begins, and `hidden` [layers, n, M].
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from specmoe_jax.checkpoints.manifest import model_hash
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.scoring.features import Features, checked_layers, feature_texts
from specmoe_jax.engine.scoring.texts import Text
from specmoe_jax.support.atomic_files import replacing, write_atomically
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.progress import bar

DESCRIPTION_FILE = "features.json"
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Form(NamedTuple):
    """How shards are kept. write, read: the arrays of one, by the path without an ending. ending: of the last file of a shard."""

    write: Callable[[str, dict[str, np.ndarray]], None]
    read: Callable[[str], dict[str, np.ndarray]]
    ending: str


def _write_safetensors(path: str, arrays: dict[str, np.ndarray]) -> None:
    with replacing(f"{path}.safetensors") as file:
        safetensors.numpy.save_file(arrays, file)


def _write_npy(path: str, arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():  # the hidden states last: where they are, all are
        with replacing(f"{path}.{name}.npy") as file, open(file, "wb") as stream:
            np.save(stream, values)


FORMS = {
    "safetensors": Form(_write_safetensors, lambda path: safetensors.numpy.load_file(f"{path}.safetensors"), ".safetensors"),
    "npy": Form(
        _write_npy,
        lambda path: {name: np.load(f"{path}.{name}.npy", mmap_mode="r") for name in ("token_ids", "starts", "hidden")},
        ".hidden.npy",
    ),
}


def write_features(
    engine: Engine,
    texts: Sequence[Text],
    folder: str,
    *,
    layers: Sequence[int] | None = None,
    form: str = "safetensors",
    dtype: str | None = None,
    texts_per_shard: int = 64,
    progress: str | bool = False,
) -> None:
    """`Engine.features` of all texts as shards in a folder; those that are there already are not computed again.

    form: "safetensors" or "npy". dtype: of the hidden states, None for the model's. texts_per_shard: read together, and the memory
    that a run takes. Raises RequestError, also where the folder holds the features of another model, other texts or layers.
    """
    dtype = dtype or engine.model.dtype
    if form not in FORMS or dtype not in DTYPES or (form == "npy" and dtype == "bfloat16"):
        said = f"form is {form!r} and dtype {dtype!r}; give {' or '.join(FORMS)} and {', '.join(DTYPES)} (npy has no bfloat16)"
        raise RequestError(said)
    if texts_per_shard < 1:
        raise RequestError(f"texts_per_shard is {texts_per_shard}; it must be at least 1")
    wanted, ids = checked_layers(engine.model.config, layers), feature_texts(engine.model, texts)
    description = {
        "version": 1,
        "model": model_hash(engine.model),
        "layers": list(wanted),
        "form": form,
        "dtype": dtype,
        "computed_in": [engine.plan.dtype, engine.plan.expert_dtype, *filter(None, [engine.plan.dense_dtype])],
        "texts": len(ids),
        "texts_per_shard": texts_per_shard,
        "text_hash": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }
    _claim(folder, description)
    starts = range(0, len(ids), texts_per_shard)
    with bar("features", len(ids), "text", mode=progress) as shown:
        for number, start in enumerate(starts):
            path, some = _shard(folder, number), ids[start : start + texts_per_shard]
            if not os.path.exists(path + FORMS[form].ending):
                FORMS[form].write(path, _arrays(list(engine.features(some, layers=wanted)), DTYPES[dtype]))
            shown.update(len(some))


def read_features(folder: str) -> Iterator[Features]:
    """What `write_features` has written, text by text. Raises RequestError for a folder that is not whole."""
    file = pathlib.Path(folder) / DESCRIPTION_FILE
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        form, count, each = FORMS[description["form"]], description["texts"], description["texts_per_shard"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RequestError(f"{folder} holds no features ({e}); give a folder that `specmoe features` has written") from e
    for number in range(-(-count // each)):
        path = _shard(folder, number)
        if not os.path.exists(path + form.ending):
            raise RequestError(f"{path}{form.ending} is missing; run the command that writes these features again")
        arrays = form.read(path)
        starts = arrays["starts"].tolist()
        for first, end in itertools.pairwise(starts):
            yield Features(tuple(arrays["token_ids"][first:end].tolist()), arrays["hidden"][:, first:end])


def _arrays(found: list[Features], dtype: np.dtype) -> dict[str, np.ndarray]:
    lengths = [len(one.token_ids) for one in found]
    return {
        "token_ids": np.concatenate([np.array(one.token_ids, np.int32) for one in found]),
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
        "hidden": np.concatenate([one.hidden for one in found], axis=1).astype(dtype),
    }


def _shard(folder: str, number: int) -> str:
    return os.path.join(folder, f"features-{number:05d}")


def _claim(folder: str, description: dict) -> None:
    """Writes what the folder is of, or compares it."""
    file = pathlib.Path(folder) / DESCRIPTION_FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as e:
        raise RequestError(f"cannot use {folder} for features ({e}); give a folder of their own") from e
    if written is None:
        write_atomically(str(file), json.dumps(description, indent=2) + "\n")
    elif changed := sorted(key for key in description if not isinstance(written, dict) or written.get(key) != description[key]):
        raise RequestError(f"{folder} was begun with other {', '.join(changed)}; give a folder of its own to each")
