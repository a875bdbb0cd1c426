"""Figures of a checkpoint that scripts/train_witness.py exported: bits per byte, routing, repetition.

    python scripts/evaluate_witness.py --model=DIR --output=report.json

Bits per byte are of the exported weights in float32, in windows without overlap, so every window starts without context.
"""

import dataclasses
import json
import pathlib

from absl import app, flags, logging

from specmoe_jax.cache_files import cache_folder
from specmoe_jax.training.witness import evaluate, export, run, samples

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "directory of the checkpoint", required=True)
flags.DEFINE_string("data_dir", str(cache_folder() / "training" / "witness_data"), "what scripts/witness_data.py wrote")
flags.DEFINE_string("prompts", None, "prompts, one a line; default: beginnings of held-out documents")
flags.DEFINE_integer("num_prompts", 10, "continuations of each kind")
flags.DEFINE_integer("new_tokens", 128, "tokens of a continuation")
flags.DEFINE_integer("evaluate_tokens", 0, "held-out tokens of a corpus; 0: all of them")
flags.DEFINE_multi_integer("length", [256, 512], "tokens of a window; the first bundled model was measured at 256")
flags.DEFINE_string("output", None, "where the report goes; default: standard output")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # JAX reports the backends that are not there as information
    folder, data_dir = pathlib.Path(FLAGS.model), pathlib.Path(FLAGS.data_dir)
    config = export.read_config(folder)
    params, bias = export.read_checkpoint(folder, config)
    texts = run.read_texts(data_dir)
    report = {"model": dataclasses.asdict(config)}
    for length in FLAGS.length:
        report[f"windows_of_{length}"] = evaluate.summary(
            params, bias, texts.held_out, texts.sizes, config=config, length=length, limit=FLAGS.evaluate_tokens
        )
    prompts = samples.beginnings(data_dir / "held_out", FLAGS.num_prompts)
    if FLAGS.prompts:
        lines = pathlib.Path(FLAGS.prompts).read_text().splitlines()
        prompts = lines[:: max(1, len(lines) // FLAGS.num_prompts)][: FLAGS.num_prompts]
    for name, temperature in (("greedy", 0.0), ("sampled_0.8", 0.8)):
        report[name] = samples.report(
            params, bias, prompts, folder / "tokenizer.json", config=config, count=FLAGS.new_tokens, temperature=temperature
        )
    text = json.dumps(report, indent=2)
    if FLAGS.output:
        pathlib.Path(FLAGS.output).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    app.run(main)
