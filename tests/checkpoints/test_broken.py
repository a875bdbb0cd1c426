"""Whatever is wrong with a checkpoint is said in one line that names the file, in a moment, in little memory."""

import os
import shutil
import time
import tracemalloc

import broken_contents  # noqa: F401 (registers its kinds)
import broken_corpus
import broken_files  # noqa: F401
import numpy as np
import pytest
from broken_corpus import KINDS

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.header import PREFIX_BYTES, header_length, parse_header
from specmoe_jax.support.errors import CheckpointError

SEED = 20
MAX_SECONDS, MAX_BYTES = 5.0, 64 << 20


def copy_of(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refusal(path) -> str:
    """The error of a load, checked to be one printable line of bounded length, time and memory."""
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    assert seconds < MAX_SECONDS and peak < MAX_BYTES
    return message


def test_corpus_has_at_least_30_kinds():
    assert len(KINDS) >= 30


@pytest.mark.parametrize("name", KINDS)
def test_broken_checkpoint_is_refused(name, small_checkpoint, tmp_path):
    path = copy_of(small_checkpoint, tmp_path)
    damage, expected = KINDS[name]
    damage(path, np.random.default_rng([SEED, *name.encode()]))
    message = refusal(path)
    assert all(piece in message for piece in expected), message


@pytest.mark.parametrize("name", ["nan_in_an_expert", "infinity_in_a_router"])
def test_infinite_weights_load_when_asked_to(name, small_checkpoint, tmp_path):
    path = copy_of(small_checkpoint, tmp_path)
    KINDS[name][0](path, np.random.default_rng(SEED))
    load_model(str(path), check_finite=False)


def test_missing_directory_is_named():
    assert "no/such/model" in refusal("no/such/model")
    assert "nothing is downloaded" in refusal("a" * 5000)
    refusal("nul\0byte")


def test_symlinked_files_load(small_checkpoint, tmp_path):
    """Download caches keep a directory of symlinks to files elsewhere."""
    for file in small_checkpoint.iterdir():
        os.symlink(file, tmp_path / file.name)
    load_model(str(tmp_path))


def test_sharded_checkpoint_loads(small_checkpoint, tmp_path):
    path = copy_of(small_checkpoint, tmp_path)
    broken_corpus.shard(path)
    load_model(str(path))


def test_random_header_damage_is_refused_or_harmless(small_checkpoint):
    """Any bytes in the header: a CheckpointError, or entries that stay inside the file; nothing else."""
    raw = (small_checkpoint / "model.safetensors").read_bytes()
    length = header_length(raw[:PREFIX_BYTES], len(raw), "f")
    rng = np.random.default_rng(SEED)
    refused = 0
    for _ in range(400):
        text = bytearray(raw[PREFIX_BYTES : PREFIX_BYTES + length])
        for at in rng.integers(0, length, int(rng.integers(1, 4))):
            text[at] = int(rng.integers(0, 256))
        try:
            header = parse_header(bytes(text), len(raw), "f")
        except CheckpointError as e:
            refused += 1
            assert str(e).isprintable()
        else:
            assert all(PREFIX_BYTES + length <= e.start <= e.end <= len(raw) for e in header.entries.values())
    assert refused > 200


ABSURD = (None, -1, 0, True, 0.5, 1e308, 10**30, "x", "", [], [[]], {}, {"rope_type": []}, 3, 2**31)


CONFIG_KEYS = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
    "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "tie_word_embeddings", "sliding_window",
    "eos_token_id", "hidden_act",
)  # fmt: skip


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_absurd_config_values_load_or_are_refused(key, small_checkpoint, tmp_path):
    path = copy_of(small_checkpoint, tmp_path)
    for value in ABSURD:
        broken_corpus.edit_config(path, **{key: value})
        start = time.perf_counter()
        try:
            load_model(str(path))
        except CheckpointError as e:
            assert str(e).isprintable() and len(str(e)) < 1000
        assert time.perf_counter() - start < MAX_SECONDS
