"""Conversions lose nothing, survive being stopped, and their mapped form is mapped."""

import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from small_checkpoint_files import RAW_CONFIG, checkpoint_tensors, write_checkpoint

from specmoe_jax.checkpoints import checkpoint_hash, load_model
from specmoe_jax.checkpoints.conversion import convert as conversion
from specmoe_jax.checkpoints.conversion import write
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.files import BLOCK_PREFIX, PADDING_PREFIX, read_header
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.packing import unpacked
from specmoe_jax.support.errors import CheckpointError, RequestError

CONFIG = parse_config(RAW_CONFIG)
SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in checkpoint_tensors(CONFIG).items()}
    return write_checkpoint(tmp_path_factory.mktemp("bf16") / "checkpoint", tensors=tensors)


def assert_same(path, other, dtype):
    model, expected = load_model(str(path), dtype=dtype), load_model(str(other), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, model.weights, expected.weights)
    jax.tree.map(np.testing.assert_array_equal, model.experts, expected.experts)
    assert model.config == expected.config
    assert model.tokenizer.encode("the best") == expected.tokenizer.encode("the best")


@pytest.mark.parametrize("to", ["specmoe", "huggingface"])
@pytest.mark.parametrize("checkpoint, dtype", [("small_checkpoint", "float32"), ("bf16_checkpoint", "bfloat16")])
def test_safetensors_forms_lose_nothing(to, checkpoint, dtype, tmp_path, request):
    source = request.getfixturevalue(checkpoint)
    result = convert(str(source), tmp_path / "result", to=to)
    for load_dtype in ("float32", "bfloat16"):
        assert_same(result, source, load_dtype)
    load_model(str(result), verify=True)
    assert {p.name for p in tmp_path.iterdir()} == {"result"}


@pytest.mark.parametrize("checkpoint", ["small_checkpoint", "bf16_checkpoint"])
def test_orbax_and_back_loses_nothing(checkpoint, tmp_path, request):
    source = request.getfixturevalue(checkpoint)
    exported = convert(str(source), tmp_path / "orbax", to="orbax")
    result = convert(str(exported), tmp_path / "back", to="huggingface")
    original = safetensors.numpy.load_file(source / "model.safetensors")
    back = {n: t for file in result.glob("*.safetensors") for n, t in safetensors.numpy.load_file(file).items()}
    assert set(back) == set(original)
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)


def test_orbax_export_holds_plain_arrays(small_checkpoint, tmp_path):
    """Whoever has Orbax alone can read it."""
    import orbax.checkpoint as ocp

    exported = convert(str(small_checkpoint), tmp_path / "orbax", to="orbax")
    weights = ocp.PyTreeCheckpointer().restore((exported / "part-00000").absolute())
    np.testing.assert_array_equal(weights["model.norm.weight"], np.ones(CONFIG.hidden_size))
    experts = ocp.PyTreeCheckpointer().restore((exported / "part-00002").absolute())
    assert experts[f"{BLOCK_PREFIX}1.2"].shape == (3, CONFIG.expert_hidden, CONFIG.hidden_size)
    with pytest.raises(CheckpointError, match="convert it first"):
        load_model(str(exported))


def test_dtype_is_converted_on_the_way(small_checkpoint, tmp_path):
    result = convert(str(small_checkpoint), tmp_path / "result", to="specmoe", dtype="bfloat16")
    assert_same(result, small_checkpoint, "bfloat16")


def test_odd_tensors_are_aligned_and_the_official_reader_agrees(bf16_checkpoint, tmp_path):
    """Some tensors are no multiple of 64 bytes: fillers keep every start aligned and the file without holes."""
    result = convert(str(bf16_checkpoint), tmp_path / "result", to="specmoe")
    for file in result.glob("*.safetensors"):
        entries = read_header(file).entries
        tensors = [entry for entry in entries.values() if not entry.name.startswith(PADDING_PREFIX)]
        assert all(entry.start % 64 == 0 for entry in tensors) and len(tensors) <= len(entries)
        with safetensors.safe_open(file, "np") as official:
            assert set(official.keys()) == set(entries)


def test_large_tensors_start_a_page(tmp_path):
    """Where that costs less than a hundredth of them."""
    sizes = {"small": 100, "large": write.LEAST_PAGED + 1, "just too small": write.LEAST_PAGED - 1, "last": write.LEAST_PAGED}
    outputs = [write.Output(name, np.dtype(np.uint8), (n,), lambda n=n: np.full(n, n % 251, np.uint8)) for name, n in sizes.items()]
    write.write_safetensors(tmp_path / "file", write.padded(outputs, PADDING_PREFIX), {})
    entries = read_header(tmp_path / "file").entries
    assert [entries[name].start % write.PAGE for name in ("small", "large", "last")] == [0, 0, 0]
    assert entries["just too small"].start % 64 == 0 < entries["just too small"].start % write.PAGE
    with safetensors.safe_open(tmp_path / "file", "np") as official:
        assert all(
            (official.get_tensor(name) == n % 251).all() and official.get_tensor(name).size == n for name, n in sizes.items()
        )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator copies the pages into pinned memory")
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="reads the mappings from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_experts_are_mapped(dtype, small_checkpoint, tmp_path):
    """Without a copy: the block's memory belongs to a mapping of the file, in pinned host memory as far as JAX knows."""
    result = convert(str(small_checkpoint), tmp_path / "result", to="specmoe", dtype=dtype)
    model = load_model(str(result), dtype=dtype)
    mappings = []
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if "result/model-" in line:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            mappings.append(range(start, end))
    for blocks in model.experts:
        for block in blocks:
            assert block.sharding.memory_kind == "pinned_host"
            assert any(block.unsafe_buffer_pointer() in mapping for mapping in mappings)


class _Stopped(Exception):
    pass


def stop_after(monkeypatch, to: str, parts: int):
    """Makes the writing of part number `parts` fail as a full disk or a signal would."""
    form, written = conversion._FORMATS[to], []

    def write(path, outputs):
        if len(written) == parts:
            raise _Stopped
        written.append(path)
        return form.write(path, outputs)

    monkeypatch.setitem(conversion._FORMATS, to, form._replace(write=write))
    return written


@pytest.mark.parametrize("to", ["specmoe", "orbax"])
def test_a_stopped_conversion_goes_on_where_it_was(to, small_checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "result"
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        stop_after(patch, to, 2)
        convert(str(small_checkpoint), output, to=to)
    assert not output.exists()
    written = stop_after(monkeypatch, to, 99)
    convert(str(small_checkpoint), output, to=to)
    assert len(written) == 1
    assert not (tmp_path / "result.partial").exists()
    back = output if to == "specmoe" else convert(str(output), tmp_path / "back", to="specmoe")
    assert_same(back, small_checkpoint, "float32")


def test_a_part_that_was_damaged_meanwhile_is_written_again(small_checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        stop_after(patch, "specmoe", 2)
        convert(str(small_checkpoint), tmp_path / "result", to="specmoe")
    part = tmp_path / "result.partial" / "model-00002-of-00003.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-100] ^= 1
    part.write_bytes(raw)
    convert(str(small_checkpoint), tmp_path / "result", to="specmoe")
    assert_same(tmp_path / "result", small_checkpoint, "float32")


def test_a_write_that_does_not_read_back_is_an_error(small_checkpoint, tmp_path, monkeypatch):
    form = conversion._FORMATS["specmoe"]
    broken = form._replace(write=lambda path, outputs: form.write(path, outputs) | {"model.norm.weight": "0" * 64})
    monkeypatch.setitem(conversion._FORMATS, "specmoe", broken)
    with pytest.raises(CheckpointError, match="reads back"):
        convert(str(small_checkpoint), tmp_path / "result", to="specmoe")
    assert not (tmp_path / "result").exists()


def test_refusals(small_checkpoint, bf16_checkpoint, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="exists"):
        convert(str(small_checkpoint), small_checkpoint, to="specmoe")
    with pytest.raises(RequestError, match="specmoe, huggingface, orbax"):
        convert(str(small_checkpoint), tmp_path / "new", to="gguf")
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        stop_after(patch, "specmoe", 1)
        convert(str(small_checkpoint), tmp_path / "result", to="specmoe")
    with pytest.raises(CheckpointError, match="another conversion"):
        convert(str(bf16_checkpoint), tmp_path / "result", to="specmoe")


def test_lossless_experts_are_mapped_and_decode_to_the_same_bits(bf16_checkpoint, tmp_path):
    result = convert(str(bf16_checkpoint), tmp_path / "result", to="specmoe", packing="lossless")
    packed, plain = load_model(str(result), dtype="bfloat16", verify=True), load_model(str(bf16_checkpoint), dtype="bfloat16")
    assert packed.config == plain.config.with_packing("lossless")
    for of_layer, expected in zip(packed.experts, plain.experts, strict=True):
        for block, wanted in zip(of_layer, expected, strict=True):
            decoded = unpacked(packed.config.experts, np.asarray(block)).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(decoded.view(np.uint16), wanted)
    on_disk = load_model(str(result), dtype="bfloat16", expert_tier="disk").experts
    np.testing.assert_array_equal(on_disk[1][2], packed.experts[1][2])
    decoded = load_model(str(result), dtype="bfloat16", expert_dtype="decoded")
    jax.tree.map(np.testing.assert_array_equal, decoded.experts, plain.experts)
    assert_same(convert(str(result), tmp_path / "back", to="huggingface"), bf16_checkpoint, "bfloat16")


def test_lossless_refusals(small_checkpoint, bf16_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="from bfloat16 alone, these are float32; leave the packing out"):
        convert(str(small_checkpoint), tmp_path / "result", to="specmoe", packing="lossless")
    for to, packing in (("huggingface", "lossless"), ("specmoe", "int8")):
        with pytest.raises(RequestError, match=f"packed as {packing} in format {to}; it must be lossless, with format specmoe"):
            convert(str(bf16_checkpoint), tmp_path / "new", to=to, packing=packing)
    packed = convert(str(bf16_checkpoint), tmp_path / "packed", to="specmoe", packing="lossless")
    with pytest.raises(CheckpointError, match="experts are packed as lossless already; leave the packing out"):
        convert(str(packed), tmp_path / "again", to="specmoe", packing="lossless")
    with pytest.raises(CheckpointError, match="another conversion"):
        (tmp_path / "new.partial").mkdir()
        (tmp_path / "new.partial" / conversion.RECORD_FILE).write_text('{"job": {}, "done": {}}')
        convert(str(bf16_checkpoint), tmp_path / "new", to="specmoe", packing="lossless")


def test_damaged_export_is_refused(small_checkpoint, tmp_path):
    exported = convert(str(small_checkpoint), tmp_path / "orbax", to="orbax")
    shutil.rmtree(exported / "part-00001")
    with pytest.raises(CheckpointError, match="part-00001"):
        convert(str(exported), tmp_path / "back", to="specmoe")


def test_ids_of_forms_differ(small_checkpoint, tmp_path):
    result = convert(str(small_checkpoint), tmp_path / "result", to="specmoe")
    assert checkpoint_hash(result) != checkpoint_hash(small_checkpoint)


def run_script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_script(small_checkpoint, tmp_path):
    model, output = f"--model={small_checkpoint}", f"--output={tmp_path / 'result'}"
    done = run_script(model, output, "--format=specmoe")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "result", small_checkpoint, "float32")
    again = run_script(model, output, "--format=specmoe")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert run_script(model, "--format=specmoe").returncode == 2
    packed = run_script(model, f"--output={tmp_path / 'packed'}", "--format=specmoe", "--expert_packing=lossless")
    assert packed.returncode == 1 and "these are float32; leave the packing out" in packed.stderr
    assert not list(tmp_path.glob("packed*"))
    half = ("--format=specmoe", "--dtype=bfloat16", "--expert_packing=lossless")
    assert run_script(model, f"--output={tmp_path / 'packed'}", *half).returncode == 0
    assert load_model(tmp_path / "packed").config.packing == "lossless"
