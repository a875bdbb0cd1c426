"""Trains an EAGLE head for a checkpoint, resumes, and measures how much of what it drafts is accepted.

    specmoe train_eagle --text=DATA/train.npy --held_out=DATA/held_out/novels.npy --work_dir=RUN --export_dir=HEAD

Texts are .npy files of token ids (what specmoe witness_data writes) or .txt files, which the model's tokenizer encodes.
The target's hidden states come from the engine batch by batch and are never stored. The order of the batches
depends on the seed and the step alone; a run that is started again goes on from its newest checkpoint under RUN.
"""

import json
import pathlib
import time

import numpy as np
import orbax.checkpoint as ocp
import tqdm
from absl import flags

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.eagle import load_head
from specmoe_jax.cli import common
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import RequestError
from specmoe_jax.training import data, eagle

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
flags.DEFINE_multi_string("text", [], "Text to train on: .npy of token ids or .txt; may be repeated.")
flags.DEFINE_multi_string("held_out", [], "Text to measure on; may be repeated.")
flags.DEFINE_string("work_dir", None, "Checkpoints and log of this run.", required=True)
flags.DEFINE_string("export_dir", None, "Where the head goes: config.json and model.safetensors.", required=True)
_FLOW = flags.DEFINE_enum(
    "expert_flow", "resident", ["resident", "on_demand"], "on_demand: for a model larger than the accelerator."
)
flags.DEFINE_integer("steps", 800, "Training steps.", lower_bound=1)
flags.DEFINE_integer("batch_size", 8, "Rows of a batch.", lower_bound=1)
flags.DEFINE_integer("length", 256, "Positions of a row.", lower_bound=2)
flags.DEFINE_float("learning_rate", 3e-5, "Peak; small models take more.", lower_bound=0)
flags.DEFINE_integer("warmup_steps", 100, "Linear warm-up; then linear to zero.", lower_bound=0)
flags.DEFINE_float("feature_weight", 1.0, "Of the smooth L1 loss between features.")
flags.DEFINE_float("token_weight", 0.1, "Of the cross entropy between the tokens read out of them.")
flags.DEFINE_float("noise", 0.2, "Width of the uniform noise on features, at length 512.")
flags.DEFINE_integer("intermediate_size", None, "Width of the head's MLP; default twice the hidden size.")
flags.DEFINE_integer("num_heads", None, "Attention heads; default the model's.")
flags.DEFINE_integer("seed", 0, "Of weights, noise and order.")
flags.DEFINE_integer("checkpoint_every", 100, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("measure_rows", 256, "Held-out prefixes to draft from, per text.", lower_bound=1)
flags.DEFINE_integer("measure_length", 5, "Tokens drafted from each.", lower_bound=1)


def main() -> None:
    training = eagle.HeadTraining(
        **{name: getattr(FLAGS, name) for name in eagle.HeadTraining.__dataclass_fields__ if name != "clip"}
    )
    if not FLAGS.text:
        common.usage_error("no text to train on; give --text=FILE")
    model = load_model(FLAGS.model, progress=True)
    held_out = {pathlib.Path(path).stem: read_tokens(path, model) for path in FLAGS.held_out}
    tokens = np.concatenate([read_tokens(path, model) for path in FLAGS.text])
    rows = (len(tokens) - 1) // training.length - 1
    if rows < training.batch_size:
        raise RequestError(
            f"the texts hold {len(tokens)} tokens, {rows} rows of {training.length}; a batch takes {training.batch_size}"
        )
    raw = eagle.default_config(model, intermediate_size=FLAGS.intermediate_size, num_heads=FLAGS.num_heads)
    work_dir = pathlib.Path(FLAGS.work_dir).absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    head, state = train(training, raw, model, tokens, work_dir)
    folder = pathlib.Path(FLAGS.export_dir)
    eagle.write_head(folder, raw, head, state.weights)
    report = {name: measure(model, folder, text) for name, text in held_out.items()}
    (work_dir / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report))


def read_tokens(path: str, model: Model) -> np.ndarray:
    """Token ids [n] of a text. Raises RequestError."""
    try:
        if path.endswith(".npy"):
            tokens = np.load(path)
        else:
            tokens = np.array(model.tokenizer.encode(pathlib.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise RequestError(f"cannot read {path} ({e}); give a .npy of token ids or a UTF-8 .txt") from e
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or len(tokens) == 0:
        raise RequestError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; expected token ids in one dimension")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise RequestError(f"{path} holds token ids outside 0..{model.config.vocab_size - 1}: it is of another tokenizer")
    return tokens


def train(training: eagle.HeadTraining, raw: dict, model: Model, tokens: np.ndarray, work_dir: pathlib.Path):
    """Runs the remaining steps -> the head and its last state."""
    head, state = eagle.init(raw, training, model)
    step_function, batches = eagle.make_step(head, training), Batches(training, model, tokens)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=FLAGS.checkpoint_every)
    with ocp.CheckpointManager(work_dir / "checkpoints", options=options) as manager, open(work_dir / "log.jsonl", "a") as log:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first = int(state.step)
        for step in (bar := tqdm.tqdm(range(first, training.steps), initial=first, total=training.steps, disable=None)):
            state, info = step_function(state, *batches.at(step))
            if step % 20 == 0 or step + 1 == training.steps:
                figures = {name: round(float(value), 4) for name, value in info._asdict().items()}
                log.write(json.dumps({"step": step, "unix_s": round(time.time(), 1), **figures}) + "\n")
                log.flush()
                bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            manager.save(step + 1, args=ocp.args.StandardSave(state), force=step + 1 == training.steps)
    return head, state


class Batches:
    """Tokens and the target's features of the batch of any step, computed when it is asked for."""

    def __init__(self, training: eagle.HeadTraining, model: Model, tokens: np.ndarray):
        plan = Plan(preset="features", expert_flow=_FLOW.value, batch_size=training.batch_size, prefill_chunk=training.length)
        self._engine, self._training, self._tokens = Engine(model, plan), training, tokens

    def at(self, step: int):
        """-> following [B, T] int32, features [B, T, M]."""
        shape = dict(batch_size=self._training.batch_size, length=self._training.length)
        rows = data.batch_at(self._tokens, step, **shape, seed=self._training.seed)  # [B, T + 1]
        found = self._engine.features(rows[:, :-1].tolist())
        return rows[:, 1:], np.stack([features.hidden[0] for features in found])


def measure(model: Model, folder: pathlib.Path, tokens: np.ndarray) -> dict:
    """Acceptance by position of greedy drafts from held-out prefixes: one step from each, as the engine itself counts.

    by_position: accepted, all before it too, of all drafts. conditional: of those whose earlier tokens were accepted
    (n-alpha of the EAGLE papers).
    """
    plan = Plan(preset="measure", draft="eagle", draft_length=FLAGS.measure_length, expert_flow=_FLOW.value)
    engine = Engine(model, plan, draft_head=load_head(str(folder), model))
    rng = np.random.default_rng(FLAGS.seed)
    longest = min(FLAGS.length, len(tokens))
    lengths = rng.integers(min(16, longest), longest + 1, FLAGS.measure_rows)
    starts = [int(rng.integers(0, len(tokens) - length + 1)) for length in lengths]
    prefixes = [tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
    engine.generate(prefixes, SamplingParams(max_new_tokens=1, ignore_eos=True))
    stats = engine.stats()
    return {
        "prefixes": len(prefixes),
        "by_position": stats["acceptance_by_position"],
        "conditional": stats["conditional_acceptance_by_position"],
        "tokens_per_step": 1 + sum(stats["acceptance_by_position"]),
    }
