"""What a checkpoint is, in hashes: one id for the whole, and a manifest of one sha256 per tensor to verify against."""

import hashlib
import json
import pathlib

from specmoe_jax.checkpoints.adapters.peft import adapter_hash
from specmoe_jax.checkpoints.files import Checkpoint, StoredTensor, open_checkpoint, read_bytes, read_json
from specmoe_jax.checkpoints.header import quote_list
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import CheckpointError

MANIFEST_FILE = "manifest.sha256.json"
MAX_MANIFEST_BYTES = 64 << 20
HASHED_SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json")
HASHED_IF_THERE = ("tiktoken.model", "qwen.tiktoken")  # newer: ids of checkpoints without them stay as they were
# Up to this much data is hashed whole; of more, so many samples of so many bytes at even distances.
WHOLE_BYTES, SAMPLES, SAMPLE_BYTES = 64 << 20, 256, 4096
STEP_BYTES = 1 << 20


def checkpoint_hash(path: str | pathlib.Path) -> str:
    """A stable id (64 hexadecimal digits) of a checkpoint directory, for caches and for jobs that resume.

    Covers config.json, generation_config.json and tokenizer.json in full; of each safetensors file its name and the
    names, types, shapes and places of its tensors; of the data everything up to 64 MiB, else 256 samples of 4 KiB at
    even distances. A retrained or requantised model gets another id; a few values changed in a large file may not:
    that is what the manifest is for. A conversion of a checkpoint has an id of its own. Raises CheckpointError.
    """
    return hash_of(open_checkpoint(pathlib.Path(path)))


def model_hash(model: Model) -> str | None:
    """checkpoint_hash of a loaded model, another with an adapter merged into it; None of one without a checkpoint."""
    if model.path is None or model.adapter is None:
        return None if model.path is None else checkpoint_hash(model.path)
    return hashlib.sha256(f"{checkpoint_hash(model.path)} {adapter_hash(model.adapter)}".encode()).hexdigest()


def hash_of(checkpoint: Checkpoint) -> str:
    """checkpoint_hash of one that is open, of whatever files."""
    path, digest = checkpoint.path, hashlib.sha256(b"specmoe checkpoint 1")
    for name in HASHED_SIDE_FILES:
        content = read_bytes(path / name) if (path / name).exists() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for name in HASHED_IF_THERE:
        if (path / name).is_file():
            digest.update(f"{name}\n".encode() + read_bytes(path / name))
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (t.path.name, t.entry.start, t.entry.name))
    for tensor in tensors:
        digest.update(repr((tensor.path.name, *tensor.entry)).encode())
    for tensor, first, count in _samples(tensors):
        for piece in tensor.read_steps(first, count, STEP_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def tensor_hash(tensor: StoredTensor) -> str:
    """sha256 of a tensor's bytes as stored."""
    digest = hashlib.sha256()
    for piece in tensor.read_steps(0, tensor.entry.bytes, STEP_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def manifest_json(hashes: dict[str, str]) -> str:
    """Text of a manifest file. hashes: sha256 by tensor name."""
    return json.dumps({"version": 1, "sha256": hashes}, indent=0)


def write_manifest(path: str | pathlib.Path) -> None:
    """Hashes every tensor of a directory and writes the manifest beside them. Raises CheckpointError."""
    path = pathlib.Path(path)
    checkpoint = open_checkpoint(path)
    hashes = {name: tensor_hash(tensor) for name, tensor in sorted(checkpoint.tensors.items())}
    temporary = path / f".{MANIFEST_FILE}.partial"
    temporary.write_text(manifest_json(hashes))
    temporary.replace(path / MANIFEST_FILE)


def verify(checkpoint: Checkpoint, progress=lambda _: None) -> None:
    """Compares every tensor with the manifest. Raises CheckpointError for the first that differs.

    progress: called with the bytes of each tensor done.
    """
    file = checkpoint.path / MANIFEST_FILE
    wanted = read_json(file, max_bytes=MAX_MANIFEST_BYTES).get("sha256")
    if not isinstance(wanted, dict):
        raise CheckpointError(f"{MANIFEST_FILE}: no sha256; expected an object of tensor name to hash")
    odd = sorted(set(wanted) ^ set(checkpoint.tensors))
    if odd:
        raise CheckpointError(f"{MANIFEST_FILE}: names other tensors than the files do: {quote_list(odd)}")
    for name, tensor in checkpoint.tensors.items():
        got = tensor_hash(tensor)
        if got != wanted[name]:
            raise CheckpointError(
                f"{tensor.where}: sha256 is {got}; {MANIFEST_FILE} says {str(wanted[name])[:64]}: the file is damaged"
            )
        progress(tensor.entry.bytes)


def _samples(tensors: list[StoredTensor]) -> list[tuple[StoredTensor, int, int]]:
    """(tensor, first byte, bytes) of what `checkpoint_hash` reads."""
    total = sum(tensor.entry.bytes for tensor in tensors)
    if total <= WHOLE_BYTES:
        return [(tensor, 0, tensor.entry.bytes) for tensor in tensors]
    samples, begin, wanted = [], 0, iter(range(0, total, -(-total // SAMPLES)))
    at = next(wanted)
    for tensor in tensors:
        while at is not None and at < begin + tensor.entry.bytes:
            samples.append((tensor, at - begin, min(SAMPLE_BYTES, begin + tensor.entry.bytes - at)))
            at = next(wanted, None)
        begin += tensor.entry.bytes
    return samples
