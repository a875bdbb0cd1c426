"""Trains the demo model, resumes, evaluates and exports it as a Hugging Face Mixtral checkpoint.

    specmoe demo_data --data_dir=DATA
    specmoe train_demo --data_dir=DATA --work_dir=RUN --export_dir=DEMO

The order of the batches depends on the seed and the step alone; a run that is started again continues from
its newest Orbax checkpoint under RUN and gives the same weights as one that was never stopped.
"""

import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import flags

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.support.progress import PROGRESS, bar
from specmoe_jax.training import data, evaluate, export, loop

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "what specmoe demo_data wrote", required=True)
flags.DEFINE_string("work_dir", None, "checkpoints and log of this run", required=True)
flags.DEFINE_string("export_dir", None, "where the Hugging Face checkpoint goes; empty: no export")
flags.DEFINE_bool("evaluate", True, "evaluate the exported weights on the held-out text")
flags.DEFINE_integer("evaluate_tokens", 0, "held-out tokens per corpus in the evaluation; 0: all of them")
flags.DEFINE_integer("steps", 620, "training steps")
flags.DEFINE_integer("batch_size", 32, "rows of a batch")
flags.DEFINE_integer("length", 256, "tokens of a row")
flags.DEFINE_float("learning_rate", 4e-3, "of the constant phase")
flags.DEFINE_integer("warmup_steps", 50, "linear warm-up")
flags.DEFINE_integer("decay_steps", 320, "linear decay to zero at the end")
flags.DEFINE_enum("optimizer", "muon", ["muon", "adamw"], "muon leaves embeddings, head, norms and gates to Adam")
flags.DEFINE_float("weight_decay", 0.02, "decoupled weight decay")
flags.DEFINE_float("balance_weight", 0.01, "weight of the load-balancing loss")
flags.DEFINE_float("capacity_factor", 2.0, "rows of an expert in training, relative to an even load")
flags.DEFINE_bool("common_experts", True, "train experts as a common part plus differences; merged on export")
flags.DEFINE_float("draft_rows", 0.25, "share of the rows of a batch routed as the self-draft would")
flags.DEFINE_integer("seed", 0, "of weights and data order")
flags.DEFINE_enum("progress", "auto", PROGRESS, "a bar on a terminal, a log line each 10 s, or nothing")
flags.DEFINE_integer("checkpoint_every", 100, "steps between checkpoints")
flags.DEFINE_enum("export_dtype", "bfloat16", ["bfloat16", "float32"], "of the exported weights")
flags.DEFINE_integer("hidden_size", 256, "M")
flags.DEFINE_integer("num_layers", 4, "L")
flags.DEFINE_integer("num_heads", 4, "H")
flags.DEFINE_integer("num_kv_heads", 2, "K")
flags.DEFINE_integer("expert_hidden", 128, "F")
flags.DEFINE_integer("num_experts", 16, "E")
flags.DEFINE_integer("experts_per_token", 2, "A")
flags.DEFINE_integer("vocab_size", 4096, "V, as the tokenizer has")


def _values(names: Iterable[str]) -> dict[str, Any]:
    """What the flags of these names hold."""
    return {name: FLAGS[name].value for name in names}


def configs() -> tuple[loop.TrainConfig, ModelConfig]:
    """The frozen configurations that the flags describe."""
    train = loop.TrainConfig(**_values(loop.TrainConfig.__dataclass_fields__))
    model = ModelConfig(
        family="mixtral",
        vocab_size=FLAGS.vocab_size,
        hidden_size=FLAGS.hidden_size,
        num_layers=FLAGS.num_layers,
        num_heads=FLAGS.num_heads,
        num_kv_heads=FLAGS.num_kv_heads,
        head_dim=FLAGS.hidden_size // FLAGS.num_heads,
        expert_hidden=FLAGS.expert_hidden,
        num_experts=FLAGS.num_experts,
        experts_per_token=FLAGS.experts_per_token,
        max_positions=max(1024, FLAGS.length),
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        sliding_window=None,
        eos_token_ids=(export.EOS_ID,),
    )
    return train, model


def restore_or_init(manager: ocp.CheckpointManager, train: loop.TrainConfig, model: ModelConfig) -> loop.TrainState:
    state = loop.init_state(train, model)
    if manager.latest_step() is None:
        return state
    return cast(loop.TrainState, manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state)))


def log_line(file, step: int, info: loop.StepInfo) -> str:
    """Appends the step's figures to the log; returns them short for the progress bar."""
    figures = {name: round(float(value), 4) for name, value in info._asdict().items()}
    file.write(json.dumps({"step": step, "unix_s": round(time.time(), 1), **figures}) + "\n")
    file.flush()
    return " ".join(f"{name} {value:.3f}" for name, value in figures.items())


def train_loop(train: loop.TrainConfig, model: ModelConfig, work_dir: pathlib.Path, tokens: np.ndarray):
    """Runs the remaining steps -> the last TrainState."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=FLAGS.checkpoint_every)
    with ocp.CheckpointManager(work_dir / "checkpoints", options=options) as manager, open(work_dir / "log.jsonl", "a") as log:
        state = restore_or_init(manager, train, model)
        steps = range(int(state.step), train.steps)
        shown = bar("train", train.steps, "step", mode=FLAGS.progress, initial=int(state.step))
        for step in steps:
            batch = data.batch_at(tokens, step, batch_size=train.batch_size, length=train.length, seed=train.seed)
            state, info = loop.train_step(state, batch, config=train, model_config=model)
            if step % 20 == 0:
                shown.set_postfix_str(log_line(log, step, info), refresh=False)
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            shown.update()
        shown.close()
        if manager.latest_step() != train.steps:
            manager.save(train.steps, args=ocp.args.StandardSave(state), force=True)
    return state


def main() -> None:
    train, model = configs()
    data_dir, work_dir = pathlib.Path(FLAGS.data_dir), pathlib.Path(FLAGS.work_dir).absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    state = train_loop(train, model, work_dir, np.load(data_dir / "train.npy"))
    if not FLAGS.export_dir:
        return
    folder = pathlib.Path(FLAGS.export_dir)
    export.write_checkpoint(folder, state.params, model, tokenizer=data_dir / "tokenizer.json", dtype=FLAGS.export_dtype)
    if FLAGS.evaluate:
        # The exported weights, not the trained ones: bfloat16 rounding is part of the model.
        params = export.from_tensors(safetensors.numpy.load_file(folder / "model.safetensors"), model)
        report = evaluate.full_report(params, model, data_dir, length=train.length, limit=FLAGS.evaluate_tokens)
        (work_dir / "report.json").write_text(json.dumps(report, indent=2))
        print(json.dumps(report))
