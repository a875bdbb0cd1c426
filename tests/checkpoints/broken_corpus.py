"""Kinds of broken checkpoints: each function damages a copy of a valid one; the seed picks the place.

KINDS: name -> (damage(path, rng), pieces of text that the error must hold).
"""

import json
import math
import os
import struct

import numpy as np
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


# ---- the file as a whole


@kind(MODEL, "bytes")
def empty_file(path, rng):
    (path / MODEL).write_bytes(b"")


@kind(MODEL, "header length")
def truncated_header(path, rng):
    raw = (path / MODEL).read_bytes()
    (path / MODEL).write_bytes(raw[: int(rng.integers(16, 500))])


@kind(MODEL, "header length is 0")
def header_length_zero(path, rng):
    replace_length(path, 0)


@kind(MODEL, "header length")
def header_length_beyond_the_file(path, rng):
    replace_length(path, (path / MODEL).stat().st_size + int(rng.integers(0, 1000)))


@kind(MODEL, "9223372036854775808")
def header_length_two_to_the_63(path, rng):
    replace_length(path, 1 << 63)


@kind(MODEL, "at most")
def header_of_gigabytes_in_a_sparse_file(path, rng):
    replace_length(path, 4 << 30)
    os.truncate(path / MODEL, 5 << 30)


@kind(MODEL, "download complete")
def truncated_data(path, rng):
    os.truncate(path / MODEL, (path / MODEL).stat().st_size - int(rng.integers(1, 1000)))


@kind(MODEL, "after the last tensor")
def trailing_bytes(path, rng):
    with open(path / MODEL, "ab") as file:
        file.write(bytes(int(rng.integers(1, 100))))


@kind(MODEL, "no safetensors file")
def a_pickle_instead(path, rng):
    (path / MODEL).write_bytes(struct.pack("<Q", 40) + b"\x80\x02}q\x00(" + bytes(100))


@kind(MODEL, "cannot be read")
def file_missing(path, rng):
    (path / MODEL).unlink()


@kind(MODEL, "is a directory")
def directory_for_a_file(path, rng):
    (path / MODEL).unlink()
    (path / MODEL).mkdir()


@kind(MODEL, "cannot be read")
def symlink_loop(path, rng):
    (path / MODEL).unlink()
    (path / MODEL).symlink_to("other")
    (path / "other").symlink_to(MODEL)


@kind(MODEL, "not a regular file")
def pipe_for_a_file(path, rng):
    (path / MODEL).unlink()
    os.mkfifo(path / MODEL)


# ---- the header


@kind(MODEL, "not UTF-8")
def invalid_utf8(path, rng):
    header, data = split_file(path)
    text = json.dumps(header).encode()
    at = text.index(b"model.")
    join_file(path, text[:at] + b"\xc3\x28" + text[at + 2 :], data)


@kind(MODEL, "not JSON")
def header_is_cut_json(path, rng):
    header, data = split_file(path)
    text = json.dumps(header).encode()
    at = int(rng.integers(len(text) // 2, len(text) - 10))
    join_file(path, text[:at], text[at:] + data)


@kind(MODEL, "nested too deep")
def header_nested_deep(path, rng):
    join_file(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


@kind(MODEL, ROUTER, "twice")
def duplicate_keys(path, rng):
    header, data = split_file(path)
    text = json.dumps(header)
    join_file(path, (text[:-1] + f', "{ROUTER}": {json.dumps(header[ROUTER])}}}').encode(), data)


@kind(MODEL, "overlaps")
def overlapping_offsets(path, rng):
    def change(header):
        shifted = [offset - 4 for offset in header[EXPERT]["data_offsets"]]
        header[EXPERT]["data_offsets"] = shifted

    edit_header(path, change)


@kind(MODEL, "hole")
def gapped_offsets(path, rng):
    header, data = split_file(path)
    at = int(np.median([v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"]))
    at = min(v["data_offsets"][0] for k, v in header.items() if k != "__metadata__" and v["data_offsets"][0] >= at)
    for name, value in header.items():
        if name != "__metadata__" and value["data_offsets"][0] >= at:
            value["data_offsets"] = [offset + 64 for offset in value["data_offsets"]]
    join_file(path, header, data[:at] + bytes(64) + data[at:])


@kind(MODEL, EXPERT, "begin <= end")
def unordered_offsets(path, rng):
    edit_header(path, lambda header: header[EXPERT]["data_offsets"].reverse())


@kind(MODEL, EXPERT, "data_offsets")
def negative_offset(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(data_offsets=[-8, 8]))


@kind(MODEL, EXPERT, "shape")
def negative_shape(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(shape=[-16, -24]))


@kind(MODEL, EXPERT, "bytes")
def shape_product_overflow(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(shape=[1 << 32, 1 << 32]))


@kind(MODEL, EXPERT, "shape")
def shape_beyond_64_bits(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(shape=[1 << 64, 0]))


@kind(MODEL, EXPERT, "bytes")
def dtype_and_size_disagree(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(dtype="BF16"))


@kind(MODEL, EXPERT, "dtype is F31")
def unknown_dtype(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(dtype="F31"))


@kind(MODEL, EXPERT, "dtype is I32")
def integer_weights(path, rng):
    edit_header(path, lambda header: header[EXPERT].update(dtype="I32"))


@kind(MODEL, EXPERT, "expected an object")
def entry_is_no_object(path, rng):
    edit_header(path, lambda header: header.update({EXPERT: 7}))


@kind(MODEL, "__metadata__")
def metadata_is_no_object_of_strings(path, rng):
    edit_header(path, lambda header: header.update(__metadata__={"format": 1}))


@kind(MODEL, "not use")
def hostile_tensor_name(path, rng):
    edit_tensors(path, lambda tensors: tensors.update({"a\nb\x1b[31m" + "c" * 100_000: np.ones(1, np.float32)}))


# ---- the index


@kind("model-00002-of-00002.safetensors", "cannot be read")
def shard_missing(path, rng):
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


@kind(INDEX, "model.extra", "not in this file")
def index_names_a_tensor_that_the_shard_lacks(path, rng):
    write_index(path, shard(path) | {"model.extra": "model-00001-of-00002.safetensors"})


@kind(INDEX, ROUTER)
def index_lacks_a_tensor_of_the_shard(path, rng):
    owners = shard(path)
    del owners[ROUTER]
    write_index(path, owners)


@kind(INDEX, "of this directory")
def index_leaves_the_directory(path, rng):
    owners = shard(path)
    (path.parent / "outside.safetensors").write_bytes((path / owners[ROUTER]).read_bytes())
    write_index(path, owners | {ROUTER: "../outside.safetensors"})


@kind(INDEX, "weight_map")
def index_without_weight_map(path, rng):
    shard(path)
    (path / INDEX).write_text("{}")


@kind("also in")
def tensor_in_two_shards(path, rng):
    owners = shard(path)
    other = "model-00001-of-00002.safetensors" if "2-of" in owners[ROUTER] else "model-00002-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(path / other)
    tensors[ROUTER] = np.zeros((3, 16), np.float32)
    safetensors.numpy.save_file(tensors, path / other)


# ---- names and shapes against config.json


@kind(MODEL, "missing", EXPERT)
def expert_missing(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop(EXPERT))


@kind(MODEL, EXPERT, "transposed")
def expert_transposed(path, rng):
    edit_tensors(path, lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)}))


@kind(MODEL, "missing", "model.norm.weight")
def norm_missing(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))


@kind(MODEL, "not use", "bias")
def unused_bias(path, rng):
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}))


@kind(MODEL, "two names")
def router_under_two_names(path, rng):
    edit_tensors(path, lambda t: t.update({ROUTER.replace("block_sparse_moe", "mlp"): t[ROUTER]}))


@kind(MODEL, "down_proj", "missing")
def half_fused(path, rng):
    shape = (3, 48, 16)
    edit_tensors(path, lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, np.float32)}))


@kind(MODEL, "q_proj", "config.json asks for")
def config_with_other_heads(path, rng):
    edit_config(path, num_attention_heads=8)


@kind(MODEL, "gate.weight", "config.json asks for")
def config_with_more_experts(path, rng):
    edit_config(path, num_local_experts=5)


@kind(CONFIG, "num_experts_per_tok")
def config_with_more_choices_than_experts(path, rng):
    edit_config(path, num_experts_per_tok=4)


@kind(MODEL, "lm_head.weight", "tie_word_embeddings")
def config_with_tied_embeddings(path, rng):
    edit_config(path, tie_word_embeddings=True)


@kind(MODEL, "lm_head.weight", "missing")
def untied_without_a_head(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))


@kind(CONFIG, "num_hidden_layers")
def config_with_a_trillion_layers(path, rng):
    edit_config(path, num_hidden_layers=2_000_000_000)


@kind(MODEL, "missing")
def config_with_one_layer_more(path, rng):
    edit_config(path, num_hidden_layers=3)


@kind(MODEL, "not use")
def config_with_one_layer_less(path, rng):
    edit_config(path, num_hidden_layers=1)


@kind("GB in float32", "host memory are free")
def more_weights_than_memory_in_a_sparse_file(path, rng):
    """Valid in every other respect: 137 GB of zeros that take no disk."""
    header, _ = split_file(path)
    at, metadata = 0, header.pop("__metadata__")
    for name, value in header.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value["shape"][0] = 1 << 30
        end = at + 4 * math.prod(value["shape"])
        value["data_offsets"], at = [at, end], end
    join_file(path, header | {"__metadata__": metadata}, b"")
    os.truncate(path / MODEL, (path / MODEL).stat().st_size + at)
    edit_config(path, vocab_size=1 << 30)


# ---- config.json itself


@kind(CONFIG, "cannot be read")
def config_missing(path, rng):
    (path / CONFIG).unlink()


@kind(CONFIG, "not JSON")
def config_not_json(path, rng):
    (path / CONFIG).write_text("vocab_size: 330")


@kind(CONFIG, "expected an object")
def config_not_an_object(path, rng):
    (path / CONFIG).write_text("[1, 2]")


@kind(CONFIG, "hidden_size")
def config_with_absurd_numbers(path, rng):
    edit_config(path, hidden_size=10**30)


@kind(CONFIG, "not JSON")
def config_with_nan(path, rng):
    edit_config(path, rms_norm_eps=float("nan"))


@kind(CONFIG, "architectures")
def config_of_another_architecture(path, rng):
    edit_config(path, architectures=["LlamaForCausalLM"])


@kind("config.json", "eos_token_id", "100000")
def eos_beyond_the_vocabulary(path, rng):
    edit_config(path, eos_token_id=100_000)


# ---- tokenizer.json


@kind(TOKENIZER, "not a tokenizer")
def tokenizer_of_no_bytes(path, rng):
    (path / TOKENIZER).write_bytes(b"")


@kind(TOKENIZER, "no token in it")
def tokenizer_without_tokens(path, rng):
    raw = json.loads((path / TOKENIZER).read_text())
    raw["model"].update(vocab={}, merges=[])
    (path / TOKENIZER).write_text(json.dumps(raw | {"added_tokens": []}))


@kind(TOKENIZER, "not a tokenizer")
def tokenizer_cut(path, rng):
    raw = (path / TOKENIZER).read_bytes()
    (path / TOKENIZER).write_bytes(raw[: int(rng.integers(1, len(raw) - 2))])


@kind(TOKENIZER, "vocab_size 330")
def tokenizer_larger_than_the_embedding(path, rng):
    raw = json.loads((path / TOKENIZER).read_text())
    raw["model"]["vocab"] |= {f"<extra {i}>": 320 + i for i in range(11)}
    (path / TOKENIZER).write_text(json.dumps(raw))


@kind(TOKENIZER, "is a directory")
def tokenizer_is_a_directory(path, rng):
    (path / TOKENIZER).unlink()
    (path / TOKENIZER).mkdir()


# ---- the weights


@kind(MODEL, EXPERT, "NaN or Inf")
def nan_in_an_expert(path, rng):
    edit_tensors(path, lambda tensors: np.put(tensors[EXPERT], int(rng.integers(0, 384)), np.nan))


@kind(MODEL, ROUTER, "NaN or Inf")
def infinity_in_a_router(path, rng):
    edit_tensors(path, lambda tensors: np.put(tensors[ROUTER], int(rng.integers(0, 48)), -np.inf))
