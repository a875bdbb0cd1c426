"""Conversions between Hugging Face, our mappable layout and Orbax: resumable, verified, whole or not at all.

specmoe      safetensors with each expert as one block [3, F, M] at a multiple of 64 bytes: `load_model` maps it. Experts of a
             quantised checkpoint stay packed as they are; the other formats decode them.
huggingface  safetensors in the names of published checkpoints, one file a layer.
orbax        one Orbax PyTree checkpoint for the weights and one for each layer's experts.

The work goes on in OUTPUT.partial, part by part; each part is read back and compared with the sha256 of what was in
memory. A run that is stopped goes on where it was; OUTPUT appears when everything is there.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from specmoe_jax.checkpoints.conversion import orbax_parts
from specmoe_jax.checkpoints.conversion.write import Output, padded, write_index, write_safetensors, write_text
from specmoe_jax.checkpoints.files import MAX_INDEX_BYTES, OWN_METHOD, PADDING_PREFIX, StoredTensor, read_header, read_json
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.checkpoints.inventory import block_name
from specmoe_jax.checkpoints.manifest import MANIFEST_FILE, manifest_json, tensor_hash
from specmoe_jax.checkpoints.source import Source, all_specs, open_source
from specmoe_jax.checkpoints.tensors import TARGET_DTYPES
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.mtp import extended
from specmoe_jax.models.packing import pack, packed_bytes
from specmoe_jax.models.packing.registry import LOSSLESS
from specmoe_jax.models.spec import Part as ExpertPart
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.support.progress import bar

FORMATS = ("specmoe", "huggingface", "orbax")
PACKINGS = (LOSSLESS,)
RECORD_FILE = "conversion.json"  # in OUTPUT.partial only: which parts are done, with their hashes
_NOT_COPIED = ("torch_dtype", "quantization_config", "compression_config")  # of config.json: what is decoded, or said anew
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "tiktoken.model", "qwen.tiktoken", "README.md", "LICENSE",
)  # fmt: skip


class Part(NamedTuple):
    """A file, or an Orbax checkpoint, of the result."""

    name: str
    outputs: list[Output]


class Format(NamedTuple):
    """How the parts of a format are named, written and hashed again from what was written."""

    part_name: Callable[[int, int], str]
    write: Callable[[pathlib.Path, list[Output]], dict[str, str]]
    stored_hashes: Callable[[pathlib.Path], dict[str, str]]


def convert(
    model: str,
    output: pathlib.Path,
    *,
    to: str,
    dtype: str | None = None,
    packing: str | None = None,
    progress: str | bool = False,
) -> pathlib.Path:
    """Converts the checkpoint directory (or bundled model) `model` into the new directory `output`; returns it.

    to: one of FORMATS. dtype: "float32" or "bfloat16"; default: bfloat16 when all of it is stored so, else float32.
    packing: "lossless" lays bfloat16 experts out in 12 bits, bit for bit (models/packing/kinds/lossless.py), for "specmoe" alone.
    Memory: one expert at a time; to Orbax one layer at a time. Raises CheckpointError.
    """
    if to not in FORMATS:
        raise RequestError(f"the format is {quote(to)}; it must be one of {', '.join(FORMATS)}")
    source = open_source(model, dtype, decode=to != "specmoe")
    if packing is not None:
        source = _packed(source, to, packing)
    if output.exists():
        raise CheckpointError(f"{output}: exists; give a new directory")
    folder = output.with_name(f"{output.name}.partial")
    parts = _parts(source, to)
    done = _begin(
        folder, {"source": source.hash, "to": to, "dtype": source.dtype} | ({"packing": packing} if packing else {}), parts
    )
    total_bytes = sum(out.bytes for part in parts for out in part.outputs)
    _check_room(folder, total_bytes)
    with bar(to, total_bytes, "B", mode=progress, scale=True) as shown:
        for part in parts:
            if not _is_intact(folder, part, to, done):
                _write_part(folder, part, to, done)
            shown.update(sum(out.bytes for out in part.outputs))
    _finish(folder, source, to, parts, done)
    folder.rename(output)
    return output


def _packed(source: Source, to: str, packing: str) -> Source:
    """The source with its experts packed. Raises RequestError for another packing or format; CheckpointError for packed experts."""
    if packing not in PACKINGS or to != "specmoe":
        one = f"it must be {' or '.join(PACKINGS)}, with format specmoe"
        raise RequestError(f"experts are to be packed as {quote(packing)} in format {quote(to)}; {one}")
    if source.config.packing is not None:
        raise CheckpointError(f"{source.path}: its experts are packed as {source.config.packing} already; leave the packing out")
    config = source.config.with_packing(packing)
    experts = (extended(config).with_packing(packing) if source.mtp else config).layer_experts

    def expert(moe: int, expert: int) -> np.ndarray:
        return pack(experts[moe], _bits(source.expert(moe, expert)))

    expert(0, 0)  # what would refuse every expert is told before anything is written
    return dataclasses.replace(
        source,
        config=config,
        expert=expert,
        block=lambda moe: (np.dtype(np.uint8), (packed_bytes(experts[moe]),)),
    )


def _bits(block: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16, which `pack` takes."""
    return block if block.dtype == np.float32 else block.view(np.uint16)


def _parts(source: Source, to: str) -> list[Part]:
    config = extended(source.config) if source.mtp else source.config
    specs = all_specs(source.config, mtp=source.mtp)
    groups = [[Output(s.name, TARGET_DTYPES[s.in_dtype(source.dtype)], s.shape, lambda s=s: source.weight(s)) for s in specs]]
    for moe in range(config.num_expert_layers):
        groups.append(_stored_experts(source, config, moe) if to == "huggingface" else _blocks(source, config, moe))
    if to == "specmoe":
        groups = [padded(group, PADDING_PREFIX) for group in groups]
    return [Part(_FORMATS[to].part_name(i, len(groups)), group) for i, group in enumerate(groups)]


def _blocks(source: Source, config: ModelConfig, moe: int) -> list[Output]:
    """Each expert of the moe-th layer that has any, as it lies in memory. config: with the layer for further tokens, if any."""
    dtype, shape = source.block(moe)
    return [Output(block_name(moe, e), dtype, shape, lambda e=e: source.expert(moe, e)) for e in range(config.num_experts)]


def _stored_experts(source: Source, config: ModelConfig, moe: int) -> list[Output]:
    """The same experts in the layout that is published: a tensor a matrix, or one tensor for all experts."""
    outputs = {}
    layouts = [family_of(config).expert_layouts(config, config.expert_layers[moe], e)[0] for e in range(config.num_experts)]
    for expert, layout in enumerate(layouts):
        for part in layout:
            experts = [expert] if part.index is None else range(config.num_experts)
            outputs[part.name] = Output(
                part.name, TARGET_DTYPES[source.dtype], part.spec.shape, functools.partial(_stored, source, moe, part, experts)
            )
    return list(outputs.values())


def _stored(source: Source, moe: int, part: ExpertPart, experts: Iterable[int]) -> np.ndarray:
    """The values of a stored tensor, read back out of the blocks of the experts that it holds."""
    return np.stack([part.view(source.expert(moe, e)) for e in experts]).reshape(part.spec.shape)


def _begin(folder: pathlib.Path, job: dict, parts: list[Part]) -> dict[str, dict[str, str]]:
    """The parts that an earlier run of the same job recorded as done: name -> hashes. Raises CheckpointError."""
    record = folder / RECORD_FILE
    if folder.exists() and not record.exists() and _holds_files(folder):
        raise CheckpointError(f"{folder}: exists and is of no conversion; move it or give another output")
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        write_text(record, json.dumps({"job": job, "done": {}}))
    raw = read_json(record, max_bytes=MAX_INDEX_BYTES)
    if raw.get("job") != job or not isinstance(raw.get("done"), dict):
        raise CheckpointError(f"{folder}: is of another conversion; delete it or give another output")
    return {part.name: raw["done"][part.name] for part in parts if part.name in raw["done"]}


def _holds_files(folder: pathlib.Path) -> bool:
    """Whether somebody else's are there; a run that was killed at once leaves hidden ones alone."""
    return not folder.is_dir() or any(not file.name.startswith(".") for file in folder.iterdir())


def _check_room(folder: pathlib.Path, total_bytes: int) -> None:
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < total_bytes - there:
        raise CheckpointError(f"{folder}: {total_bytes - there} bytes needed, {free} free on that disk")


def _is_intact(folder: pathlib.Path, part: Part, to: str, done: dict) -> bool:
    if part.name not in done:
        return False
    try:
        return _FORMATS[to].stored_hashes(folder / part.name) == done[part.name]
    except CheckpointError:
        return False


def _write_part(folder: pathlib.Path, part: Part, to: str, done: dict) -> None:
    """Writes, reads back, compares, records."""
    done[part.name] = _FORMATS[to].write(folder / part.name, part.outputs)
    if not _is_intact(folder, part, to, done):
        raise CheckpointError(f"{folder / part.name}: reads back other than it was written: is the disk sound?")
    raw = read_json(folder / RECORD_FILE, max_bytes=MAX_INDEX_BYTES)
    write_text(folder / RECORD_FILE, json.dumps(raw | {"done": done}))


def _finish(folder: pathlib.Path, source: Source, to: str, parts: list[Part], done: dict) -> None:
    """Everything but the weights: configs, tokenizer, index, manifest."""
    write_text(folder / "config.json", json.dumps(_config_json(source), indent=2))
    for name in SIDE_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    hashes = {name: sha256 for part in parts for name, sha256 in done[part.name].items()}
    if to == "orbax":
        orbax_parts.write_description(folder, source.dtype, hashes)
    else:
        owners = {out.name: part.name for part in parts for out in part.outputs}
        write_index(folder, owners, sum(out.bytes for part in parts for out in part.outputs))
        write_text(folder / MANIFEST_FILE, manifest_json(hashes))
    (folder / RECORD_FILE).unlink()
    for leftover in (*folder.glob(".*.partial"), *folder.glob("*.orbax-checkpoint-tmp*")):  # of a run that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _config_json(source: Source) -> dict:
    """The config of the result, which has the names of the class with the output matrix even if its source had not."""
    raw = {k: v for k, v in read_json(source.path / "config.json").items() if k not in _NOT_COPIED}
    if isinstance(inner := raw.get("text_config"), dict):
        raw["text_config"] = {k: v for k, v in inner.items() if k not in _NOT_COPIED}
    built = family_of(source.config).ARCHITECTURE
    bare = built.replace("ForCausalLM", "Model").replace("ForConditionalGeneration", "Model")
    named = {"architectures": [built]} if raw.get("architectures") in (None, [], [bare]) else {}
    packing = source.config.packing
    packed = {} if packing is None else {"quantization_config": {"quant_method": OWN_METHOD, "packing": packing}}
    return raw | {"dtype": source.dtype} | named | packed


def _safetensors_name(part: int, parts: int) -> str:
    return f"model-{part + 1:05}-of-{parts:05}.safetensors"


def _stored_hashes(path: pathlib.Path) -> dict[str, str]:
    return {name: tensor_hash(StoredTensor(path, entry)) for name, entry in read_header(path).entries.items()}


_FORMATS = {
    "specmoe": Format(
        part_name=_safetensors_name,
        write=lambda path, outputs: write_safetensors(path, outputs, {"format": "specmoe", "version": "1"}),
        stored_hashes=_stored_hashes,
    ),
    "huggingface": Format(
        part_name=_safetensors_name,
        write=lambda path, outputs: write_safetensors(path, outputs, {"format": "pt"}),
        stored_hashes=_stored_hashes,
    ),
    "orbax": Format(part_name=orbax_parts.part_name, write=orbax_parts.write_part, stored_hashes=orbax_parts.stored_hashes),
}
