"""The training script end to end on a tiny model, and the arithmetic that its figures rest on."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.training import data, evaluate, export, model, self_draft

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCAB = 300
TINY = ModelConfig(
    family="mixtral",
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    expert_hidden=16,
    num_experts=4,
    experts_per_token=2,
    max_positions=1024,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    sliding_window=None,
    eos_token_ids=(2,),
)
SIZES = [
    "--hidden_size=32",
    "--num_layers=2",
    "--num_heads=2",
    "--num_kv_heads=1",
    "--expert_hidden=16",
    "--num_experts=4",
    f"--vocab_size={VOCAB}",
    "--batch_size=4",
    "--length=48",
    "--warmup_steps=1",
    "--decay_steps=1",
    "--checkpoint_every=1",
    "--export_dtype=float32",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A data directory as scripts/demo_data.py leaves it, with random tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "held_out").mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "train.npy", rng.integers(3, VOCAB, 2000).astype(np.uint16))
    np.save(folder / "held_out" / "noise.npy", rng.integers(3, VOCAB, 1000).astype(np.uint16))
    (folder / "corpus.json").write_text(json.dumps({"noise": {"held_out_bytes": 2000}}))
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    return folder


def run_script(corpus: pathlib.Path, work: pathlib.Path, steps: int, *extra: str) -> None:
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        # The run that resumes compiles what the whole run compiled.
        "JAX_COMPILATION_CACHE_DIR": str(corpus / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/train_demo.py"),
            f"--data_dir={corpus}",
            f"--work_dir={work}",
            f"--export_dir={work}/export",
            f"--steps={steps}",
            *SIZES,
            *extra,
        ],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


def exported(work: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(work / "export/model.safetensors")


@pytest.mark.slow
def test_resume_equals_one_run_and_export_has_hugging_face_names(corpus, tmp_path):
    # The planned end shapes the learning rate only in the decay; without one, 2 + 1 steps equal 3.
    run_script(corpus, tmp_path / "whole", 3, "--decay_steps=0")
    run_script(corpus, tmp_path / "parts", 2, "--decay_steps=0", "--noevaluate")
    run_script(corpus, tmp_path / "parts", 3, "--decay_steps=0", "--noevaluate")
    whole, parts = exported(tmp_path / "whole"), exported(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    assert whole["model.layers.1.block_sparse_moe.gate.weight"].shape == (4, 32)
    assert whole["model.layers.1.block_sparse_moe.experts.3.w2.weight"].shape == (32, 16)
    assert len(whole) == 3 + 2 * (7 + 3 * 4)
    report = json.loads((tmp_path / "whole/report.json").read_text())
    assert report["bits_per_byte"]["all"] > 0
    assert np.sum(report["routing"]["load_share"][0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parity
def test_exported_logits_equal_transformers(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    params = model.init_params(jax.random.key(1), TINY, common_experts=True)
    export.write_checkpoint(tmp_path, params, TINY, tokenizer=corpus / "tokenizer.json", dtype="float32")
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 24))
    reference = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    read = export.from_tensors(safetensors.numpy.load_file(tmp_path / "model.safetensors"), TINY)
    np.testing.assert_allclose(model.forward(read, jnp.asarray(tokens), TINY)[0], wanted, atol=1e-4)


def test_dispatch_with_room_for_all_equals_dense():
    layer = model.init_params(jax.random.key(0), TINY, common_experts=False).layers[0]
    x = jax.random.normal(jax.random.key(1), (40, 32))
    ids, weights, _ = model.route(x, layer.gate, 2)
    experts = jax.tree.map(lambda w: 10 * w, model.merged(layer))
    out, dropped = model.dispatch_ffn(x, ids, weights, experts, 40)
    assert dropped == 0
    np.testing.assert_allclose(out, model.dense_ffn(x, ids, weights, experts), atol=1e-5)
    assert model.dispatch_ffn(x, ids, weights, experts, 4)[1] == 80 - jnp.sum(
        jnp.minimum(jnp.bincount(ids.reshape(-1), length=4), 4)
    )


def test_batches_visit_every_window_once_an_epoch():
    tokens = np.arange(101)
    seen = np.concatenate([data.batch_at(tokens, s, batch_size=3, length=10, seed=0)[:, 0] for s in range(3)])
    assert len(set(seen.tolist())) == 9
    assert (np.diff(np.sort(seen)) == 10).all()


def test_held_out_windows_predict_each_token_once():
    inputs, targets = data.held_out_windows(np.arange(10, 21), 4)
    np.testing.assert_array_equal(targets[targets >= 0], np.arange(11, 21))
    np.testing.assert_array_equal(inputs[0], [10, 11, 12, 13])


def test_stand_ins_keep_residents_and_take_the_nearest():
    distances = jnp.asarray([[0, 1, 9], [1, 0, 5], [9, 5, 0]], jnp.float32)
    resident = self_draft.hottest(jnp.asarray([3, 1, 3]), 1)
    np.testing.assert_array_equal(resident, [True, False, False])
    np.testing.assert_array_equal(self_draft.stand_ins(jnp.asarray([False, True, True]), distances), [1, 1, 2])


@pytest.mark.slow
def test_a_draft_with_every_expert_resident_is_always_accepted():
    params = model.init_params(jax.random.key(3), TINY, common_experts=True)
    tokens = jax.random.randint(jax.random.key(4), (2, 64), 0, VOCAB)
    assert bool(jnp.all(evaluate.chain_acceptance(params, tokens, TINY, 4) == 1))
    logits, traces = model.forward(params, tokens, TINY)
    starts = jnp.asarray([40])
    native = jnp.broadcast_to(jnp.arange(4), (2, 1, 4))
    first = evaluate.run_chains(params, tokens, starts, TINY, traces=traces, tables=native)[:, 0, 0]
    np.testing.assert_array_equal(first, jnp.argmax(logits[:, 40], axis=-1))
