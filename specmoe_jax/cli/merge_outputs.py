"""Joins the answers of a job's shards (generate --shard) into one output in the order of the prompts.

Example:
    specmoe merge_outputs --output=answers.jsonl
"""

from absl import flags

from specmoe_jax.cli import common
from specmoe_jax.jobs.shards import merge

_OUTPUT = flags.DEFINE_string("output", None, "What generate --shard was given as --output; the shards are beside it and stay.")


def main() -> None:
    if _OUTPUT.value is None:
        common.usage_error("--output is missing; --help explains the flags")
    print(f"{merge(_OUTPUT.value)} answers: {_OUTPUT.value}")
