"""GGUF files of mixtures of experts are the models that they were converted from."""

import json

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.checkpoints import checkpoint_hash
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.experts import is_mappable
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.inventory import take_inventory
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.model_tokenizer import load_model_tokenizer
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import CheckpointError

pytest.importorskip("gguf")
from small_gguf_files import CONFIGS, write_pair

TOKENS = np.random.default_rng(1).integers(3, 300, (1, 12))
LARGE = {"hidden_size": 256, "num_hidden_layers": 1, "num_local_experts": 2}  # K-quants come in blocks of 256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_close(packed, want):
    """Experts stay packed, and the logits are those of the decoded ones up to the order of sums."""
    assert packed.config.packing.startswith("gguf:") and np.asarray(packed.experts[0][0]).dtype == np.uint8
    logits, exact = packed.logits(TOKENS), want.logits(TOKENS)
    assert np.abs(logits - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_it_is_the_model_that_it_was_converted_from(architecture, tmp_path):
    """Config, names, order of rows, experts: the same logits bit for bit where experts are decoded, and the same text."""
    file, directory = write_pair(tmp_path, architecture)
    model, want = sm.load_model(str(file), expert_dtype="decoded"), sm.load_model(str(directory))
    assert model.config == want.config
    np.testing.assert_array_equal(model.logits(TOKENS), want.logits(TOKENS))
    assert_close(sm.load_model(str(file)), want)
    text = "It was the best of times 12 naïve café </s>"
    assert model.tokenizer.encode(text) == want.tokenizer.encode(text)
    assert sm.chat_template(model, [{"role": "user", "content": "It was"}], tokenize=False) == "<s>It was"


@pytest.mark.parametrize("architecture", ["deepseek2", "deepseek2-v3"])
def test_a_projection_that_was_cut_in_two(architecture, tmp_path):
    file, directory = write_pair(tmp_path, architecture, cut=True)
    model, want = sm.load_model(str(file), expert_dtype="decoded"), sm.load_model(str(directory))
    assert model.config == want.config
    np.testing.assert_array_equal(model.logits(TOKENS), want.logits(TOKENS))


@pytest.mark.parametrize(
    ("types", "others"),
    [(("Q4_K", "Q5_K", "Q6_K"), "Q8_0"), (("Q2_K", "Q3_K", "IQ4_NL"), "Q4_0"), (("F32", "F16", "BF16"), "BF16")],
)
def test_blocks_are_decoded_as_the_package_does(types, others, tmp_path):
    sizes = LARGE | {"intermediate_size": 256}
    file, directory = write_pair(tmp_path, "llama", sizes=sizes, experts=types, others=others)
    want, kept = sm.load_model(str(directory)), types[0] == "Q4_K"  # of the others one type at least is not kept packed
    decoded = sm.load_model(str(file), expert_dtype="decoded" if kept else None)
    np.testing.assert_array_equal(decoded.logits(TOKENS), want.logits(TOKENS))
    if kept:
        assert_close(sm.load_model(str(file)), want)


def test_a_split_file_and_a_directory(tmp_path):
    """Any part, or the directory that holds them, names the whole; a missing part is named."""
    first, directory = write_pair(tmp_path, "qwen3moe", split=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    want = sm.load_model(str(directory)).logits(TOKENS)
    for name in (first, parts[-1], tmp_path):
        np.testing.assert_array_equal(sm.load_model(str(name), expert_dtype="decoded").logits(TOKENS), want)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"one of 3 parts, and {parts[1].name} missing beside it; download all"):
        checkpoint_path(str(first))


def test_several_models_in_a_directory(tmp_path):
    for name in ("a-Q4.gguf", "b-Q8.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds several models, a-Q4.gguf, b-Q8.gguf; give the path of one"):
        checkpoint_path(str(tmp_path))


def test_a_changed_file_is_read_anew(tmp_path):
    """Another file under the same name is another model, though its metadata is kept in the cache."""
    file, _ = write_pair(tmp_path / "one", "llama")
    other, directory = write_pair(tmp_path / "two", "llama", sizes={"rope_theta": 1e4})
    first = checkpoint_path(str(file))
    assert checkpoint_path(str(file)) == first and checkpoint_hash(first) == checkpoint_hash(checkpoint_path(str(first)))
    other.replace(file)
    assert load_config(checkpoint_path(str(file))).with_packing(None) == load_config(directory)


def test_without_a_cache(tmp_path, monkeypatch):
    """A home that cannot be written: for this process alone."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file, directory = write_pair(tmp_path / "one", "llama")
    assert load_config(checkpoint_path(str(file))).with_packing(None) == load_config(directory)


def test_conversion(tmp_path):
    """What it is converted to has the same values and the whole tokenizer; in our layout experts are packed, and mapped."""
    mixed = {0: ("MXFP4", "MXFP4", "Q8_0"), 1: ("MXFP4", "MXFP4", "MXFP4")}
    file, directory = write_pair(tmp_path, "gpt-oss", experts=mixed.get)
    want, message = sm.load_model(str(directory)), [{"role": "user", "content": "hi"}]
    packed = sm.load_model(str(file))
    for form in ("specmoe", "huggingface"):
        folder = convert(str(file), tmp_path / form, to=form)
        model = sm.load_model(str(folder))
        assert sm.chat_template(model, message, tokenize=False) == "<s>hi"
        if form == "huggingface":
            np.testing.assert_array_equal(model.logits(TOKENS), want.logits(TOKENS))
            continue
        assert model.config.packing == packed.config.packing == "gguf:MXFP4,MXFP4,Q8_0|gguf:MXFP4,MXFP4,MXFP4"
        inventory = take_inventory(model.config, open_checkpoint(folder))
        assert all(is_mappable(source, "float32") for layer in inventory.experts for source in layer)
        np.testing.assert_array_equal(model.logits(TOKENS), packed.logits(TOKENS))


def test_memory_is_what_the_disk_holds(tmp_path):
    """Layers of unlike types: each expert takes its own bytes, in memory as in the file; a slot takes the largest."""
    types = {0: ("Q4_0", "Q4_0", "Q8_0"), 1: ("Q4_0", "Q4_0", "Q4_0")}
    file, _ = write_pair(tmp_path, "llama", experts=types.get)
    model, stored = sm.load_model(str(file)), open_checkpoint(checkpoint_path(str(file))).tensors
    on_disk = sum(tensor.entry.bytes for name, tensor in stored.items() if ".experts." in name)
    assert sum(np.asarray(block).nbytes for layer in model.experts for block in layer) == on_disk
    own = account(model.config, sm.PRESETS["specmoe"](model.config), batch_rows=1, positions=64)
    assert abs(own.host_expert_bytes - on_disk) <= own.host_experts
    assert own.slot_bytes == np.asarray(model.experts[0][0]).nbytes > np.asarray(model.experts[1][0]).nbytes


def test_blocks_that_decode_to_nan_are_refused(tmp_path):
    file, _ = write_pair(tmp_path, "llama")
    tensor = open_checkpoint(checkpoint_path(str(file))).tensors["model.layers.1.mlp.experts.down_stack"]
    content = bytearray(file.read_bytes())
    content[tensor.entry.end - 34 : tensor.entry.end - 32] = b"\xff\x7f"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.gguf: tensor .*_stack: decodes to NaN or Inf"):
        sm.load_model(str(file))
    assert sm.load_model(str(file), check_finite=False).config.packing == "gguf:Q8_0,Q8_0,Q8_0"


def test_ends_and_sampling_of_the_metadata(tmp_path):
    metadata = {"tokenizer.ggml.eot_token_id": 7, "general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    file, _ = write_pair(tmp_path, "llama", metadata=metadata)
    folder = checkpoint_path(str(file))
    assert load_config(folder).eos_token_ids == (2, 7)
    begin, *_, end = load_model_tokenizer(folder, load_config(folder)).encode("It was")
    assert (begin, end) == (1, 2)
    wanted = {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20, "do_sample": True}
    assert json.loads((folder / "generation_config.json").read_text()) == wanted


def test_sentencepiece(tmp_path):
    """Merged by score; what is no token falls into bytes; a space before the first word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "t", "h", "e", "ti", "tim", "time", "▁time", "▁t", "he", "▁the", "th", "i", "m", "s"]
    scores = [0.0] * len(pieces) + [-float(i) for i in range(len(words))]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces + words, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words), "tokenizer.ggml.merges": None,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.pre": "default",
    }  # fmt: skip
    file, _ = write_pair(tmp_path, "llama", metadata=metadata)
    folder = checkpoint_path(str(file))
    tokenizer = load_model_tokenizer(folder, load_config(folder))
    names = pieces + words
    got = tokenizer.encode("the times é</s>")
    assert [names[i] for i in got] == ["<s>", "▁the", "▁time", "s", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(got) == "the times é"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (
            {"general.architecture": "phi3"},
            "architecture phi3; GGUF files are read of llama, qwen2moe, qwen3moe, deepseek2, gpt-oss",
        ),
        ({"llama.expert_count": 0}, "a dense llama, without experts; this engine runs mixtures of experts: specmoe carve"),
        ({"llama.block_count": None}, "metadata llama.block_count: missing"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is longrope; built are none, linear and yarn"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer gpt2, split by tekken; built are gpt-2"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer rwkv; built are gpt2, llama"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(metadata, words, tmp_path):
    file, _ = write_pair(tmp_path, "llama", metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        sm.load_model(str(file))
    assert words in str(caught.value) and "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


def test_a_truncated_file(tmp_path):
    file, _ = write_pair(tmp_path, "llama")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"^model.gguf: not a GGUF file that the gguf package reads"):
        sm.load_model(str(file))
