"""Damages of safetensors files and their index."""

import json
import os
import struct

import numpy as np
import safetensors.numpy
from broken_corpus import (
    EXPERT,
    INDEX,
    MODEL,
    ROUTER,
    edit_header,
    edit_tensors,
    join_file,
    kind,
    replace_length,
    shard,
    split_file,
    write_index,
)

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
