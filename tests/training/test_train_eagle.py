"""The training of EAGLE heads: the arithmetic, the target's features, and the script end to end with a resume."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import specmoe_jax as sm
from specmoe_jax.models.eagle import network
from specmoe_jax.models.quantised import quantise
from specmoe_jax.speculate.drafts.eagle import EagleDraft
from specmoe_jax.support.errors import RequestError
from specmoe_jax.testing import TINY, eagle_head, tiny, write_tiny
from specmoe_jax.training import eagle

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train_eagle.py"
TRAINING = eagle.HeadTraining(steps=30, batch_size=2, length=12, learning_rate=3e-3, warmup_steps=1, seed=0, noise=0.0)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, 12, TINY.hidden_size), np.float32)
    return rng.integers(0, TINY.vocab_size, (2, 12)).astype(np.int32), features


@pytest.mark.slow
def test_the_training_form_is_the_cached_form():
    head, (following, features) = eagle_head(tiny()), batch()
    kv = EagleDraft(head).new_memory(2, 16).kv
    rows, zeros = jnp.arange(2, dtype=jnp.int32), jnp.zeros(2, jnp.int32)
    cached, _ = network.forward(head, following, jnp.asarray(features), kv, rows, zeros, zeros + 12)
    np.testing.assert_allclose(eagle.predict(head, following, features), cached, atol=3e-5)


def test_a_step_learns_and_changes_only_the_head():
    model = tiny()
    head, state = eagle.init(eagle.default_config(model), TRAINING, model)
    step, before = eagle.make_step(head, TRAINING), np.asarray(model.weights.embed).copy()
    infos = []
    for _ in range(TRAINING.steps):
        state, info = step(state, *batch())
        infos.append(info)
    assert infos[-1].feature_loss < 0.7 * infos[0].feature_loss
    assert infos[-1].token_loss < infos[0].token_loss
    np.testing.assert_array_equal(model.weights.embed, before)


@pytest.mark.slow
def test_the_loss_is_the_published_one():
    """Smooth L1 plus a tenth of the soft cross entropy, in numpy."""
    head, (following, features) = eagle_head(tiny()), batch(1)
    total, _ = eagle.loss(head, following, jnp.asarray(features), jnp.zeros_like(features), TRAINING)
    predicted = np.asarray(eagle.predict(head, following[:, :-1], features[:, :-1]), np.float64)
    gap, output = np.abs(predicted - features[:, 1:]), np.asarray(head.output, np.float64)
    smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    log_softmax = lambda x: x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))  # noqa: E731
    wanted, got = (log_softmax(f.astype(np.float64) @ output.T) for f in (features[:, 1:], predicted))
    assert float(total) == pytest.approx(smooth - 0.1 * (np.exp(wanted) * got).sum(-1).mean(), rel=1e-5)


def test_a_written_head_loads_with_half_precision(tmp_path):
    model, raw = tiny(), eagle.default_config(tiny())
    head, state = eagle.init(raw, TRAINING, model)
    eagle.write_head(tmp_path, raw, head, state.weights)
    loaded = sm.load_head(str(tmp_path), model)
    assert loaded.config == head.config
    for got, want in zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(state.weights), strict=True):
        np.testing.assert_array_equal(got, np.asarray(want).astype(np.float16).astype(np.float32))


def run_script(folder, work, *extra):
    return subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            f"--model={folder / 'model'}",
            f"--text={folder / 'text.npy'}",
            f"--held_out={folder / 'text.npy'}",
            f"--work_dir={work}",
            f"--export_dir={work / 'head'}",
            "--steps=4",
            "--batch_size=2",
            "--length=16",
            "--checkpoint_every=1",
            "--warmup_steps=1",
            "--measure_rows=3",
            *extra,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_script_resumes_to_the_same_head_and_reports(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny(tmp_path / "model")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 256, 400).astype(np.uint16))
    whole = run_script(tmp_path, tmp_path / "run")
    assert whole.returncode == 0, whole.stderr
    report = json.loads(whole.stdout)["text"]
    assert report["prefixes"] == 3 and len(report["by_position"]) == 5
    first = safetensors.numpy.load_file(tmp_path / "run/head/model.safetensors")
    shutil.rmtree(tmp_path / "run/checkpoints/4")  # as if it had been stopped after the third step
    again = run_script(tmp_path, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    second = safetensors.numpy.load_file(tmp_path / "run/head/model.safetensors")
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl")] == [0, 3, 3]
    np.save(tmp_path / "text.npy", np.full(400, TINY.vocab_size))
    wrong = run_script(tmp_path, tmp_path / "other")
    assert wrong.returncode == 1 and "another tokenizer" in wrong.stderr
    np.save(tmp_path / "text.npy", np.zeros(40, np.int32))
    short = run_script(tmp_path, tmp_path / "other")
    assert short.returncode == 1 and "1 rows of 16; a batch takes 2" in short.stderr


def test_a_packed_output_matrix_is_refused():
    model = quantise(tiny(), dense_dtype="int8")
    head, _ = eagle.init(eagle.default_config(model), TRAINING, model)
    with pytest.raises(RequestError, match="output matrix is packed, through which no gradient goes"):
        eagle.make_step(head, TRAINING)
