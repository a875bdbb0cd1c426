"""Trains the fine-grained MoE, resumes, and exports it as a Hugging Face glm4_moe checkpoint with its MTP layer.

    specmoe witness_data
    specmoe train_witness                        # constant learning rate, until stopped; again: goes on
    specmoe train_witness --decay_steps=2000 --export_dir=DIR   # finishes a copy of the newest checkpoint
    specmoe train_witness --work_dir=W --start_from=DIR --repeat_weight=1   # goes on from exported weights, against repetition

The order of the batches depends on the seed and the step alone. SIGTERM ends a run after the step in progress, saved.
"""

import dataclasses
import pathlib

import jax
from absl import flags

from specmoe_jax.support.cache_files import cache_folder
from specmoe_jax.support.errors import UserError
from specmoe_jax.support.progress import PROGRESS
from specmoe_jax.training.witness import export, run
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig

FLAGS = flags.FLAGS
HOME = cache_folder() / "training"
flags.DEFINE_string("data_dir", str(HOME / "witness_data"), "what specmoe witness_data wrote")
flags.DEFINE_string("work_dir", str(HOME / "witness"), "checkpoints and log of this run")
flags.DEFINE_string("start_from", None, "an exported checkpoint whose weights a new run begins with; none: random weights")
flags.DEFINE_string("export_dir", None, "where the finished checkpoint goes as a glm4_moe directory; none: no export")
flags.DEFINE_float(
    "export_share",
    1.0,
    "of the trained weights in what is exported, 0 to 1; the rest is start_from's (WiSE-FT)",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_enum("export_dtype", "bfloat16", ["bfloat16", "float32"], "of the exported weights")
flags.DEFINE_enum("progress", "auto", PROGRESS, "a bar on a terminal, a log line each 10 s, or nothing")

DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
for group, what in ((WitnessConfig, "size of the model"), (RecipeConfig, "recipe"), (run.Rhythm, "rhythm of the run")):
    for field in dataclasses.fields(group):
        if field.name != "progress":
            DEFINE[field.type](field.name, field.default, f"{what}: field of {group.__name__}")


def read(group):
    """The frozen configuration that the flags describe."""
    return group(**{field.name: FLAGS[field.name].value for field in dataclasses.fields(group)})


def main() -> None:
    if FLAGS.export_share != 1 and not (FLAGS.start_from and FLAGS.export_dir):
        raise UserError(
            f"export_share is {FLAGS.export_share:g}, which needs start_from and export_dir; give both, or leave it out"
        )
    jax.config.update("jax_compilation_cache_dir", str(HOME / "xla"))  # a step compiles for a minute
    data_dir, config = pathlib.Path(FLAGS.data_dir), read(WitnessConfig)
    texts, start_from = run.read_texts(data_dir), pathlib.Path(FLAGS.start_from) if FLAGS.start_from else None
    state = run.train(config, read(RecipeConfig), pathlib.Path(FLAGS.work_dir), texts, read(run.Rhythm), start_from)
    if FLAGS.export_dir:
        folder, tokenizer = pathlib.Path(FLAGS.export_dir), data_dir / "tokenizer.json"
        weights = run.finished(state, config, start_from, FLAGS.export_share)
        export.write_checkpoint(folder, *weights, config, tokenizer=tokenizer, dtype=FLAGS.export_dtype)
