"""Broken checkpoints: what the two files of damages share.

KINDS: name -> (damage(path, rng), pieces of text that the error must hold). Each damages a copy of a valid checkpoint;
the seed picks the place.
"""

import json
import struct

import safetensors.numpy

MODEL, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
KINDS = {}


def kind(*expected):
    """Registers a damage under its function's name."""

    def register(function):
        KINDS[function.__name__] = (function, expected)
        return function

    return register


def split_file(path):
    """(header as a dict, data bytes) of a safetensors file."""
    raw = (path / MODEL).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path, header, data):
    """Writes the header (dict, or bytes as they are) and the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path, change):
    header, data = split_file(path)
    change(header)
    join_file(path, header, data)


def edit_config(path, **changes):
    raw = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(raw | changes))


def edit_tensors(path, change):
    tensors = safetensors.numpy.load_file(path / MODEL)
    change(tensors)
    safetensors.numpy.save_file(tensors, path / MODEL)


def replace_length(path, length):
    raw = (path / MODEL).read_bytes()
    (path / MODEL).write_bytes(struct.pack("<Q", length) + raw[8:])


def shard(path):
    """Splits the file in two with an index; returns the index."""
    tensors = safetensors.numpy.load_file(path / MODEL)
    names = sorted(tensors)
    owners = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(owners.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in names if owners[n] == file}, path / file)
    (path / MODEL).unlink()
    write_index(path, owners)
    return owners


def write_index(path, owners):
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))
