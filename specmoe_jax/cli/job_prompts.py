"""The prompts of `generate`: of the flags and of a file, with their sampling, and the part of them that a run does."""

import pathlib
from typing import Any

from absl import flags

from specmoe_jax.cli.flag_groups import generate_flags as own
from specmoe_jax.cli.flag_groups import plan_flags, sampling_flags
from specmoe_jax.config.sampling_params import OF_DRAWS
from specmoe_jax.jobs.prompts import Prompt, read_prompts
from specmoe_jax.jobs.shards import Part, parse_shard
from specmoe_jax.jobs.tables import as_table, check_output
from specmoe_jax.support.errors import RequestError


def read_all_prompts(folder: pathlib.Path) -> list[Prompt]:
    """Prompts of the flags and then of the file, with the sampling flags, or else the model's own defaults."""
    sampling = sampling_flags.sampling(folder)
    # What only sampled requests take; the lines of a file may be sampled where the flags say greedy.
    drawn = {name: sampling[name] for name in OF_DRAWS}
    some_may_be_sampled = own.PROMPTS.value is not None and sampling["temperature"] == 0
    defaults = sampling_flags.params(sampling | (OF_DRAWS if some_may_be_sampled else {}))
    if not own.OUTPUT.value and (flag := sampling_flags.given_logprobs()):
        raise RequestError(f"--{flag} has no effect without --output, whose records hold them; give both")
    prompts = [Prompt(number, text, defaults) for number, text in enumerate(own.PROMPT.value)]
    if own.PROMPTS.value:
        prompts += read_prompts(
            own.PROMPTS.value, defaults, sampled=drawn, keep_bad=own.OUTPUT.value is not None, column=own.PROMPT_COLUMN.value
        )
    elif own.PROMPT_COLUMN.value:
        raise RequestError("--prompt_column has no effect without --prompts; leave it out")
    if own.OUTPUT.value and as_table(own.OUTPUT.value):
        check_output(own.OUTPUT.value, prompts)
    if all(prompt.params.temperature == 0 for prompt in prompts):
        refuse_without_effect(drawn)
    return prompts


def part_of(prompts: list[Prompt]) -> Part:
    """The part of the job that this run does."""
    if not own.SHARD.value or not own.OUTPUT.value:
        return Part(prompts, None, own.OUTPUT.value)
    shard = parse_shard(own.SHARD.value)
    return Part(prompts, shard, shard.output(own.OUTPUT.value))


def refuse_without_effect(drawn: dict[str, Any]) -> None:
    """Raises RequestError for flags that matter to sampled requests alone."""
    given = {"--seed": flags.FLAGS["seed"].present, "--deterministic_sampling": plan_flags.value("deterministic_sampling")}
    given |= {f"--{name}": drawn[name] != neutral for name, neutral in OF_DRAWS.items()}
    for flag in filter(given.get, given):
        raise RequestError(f"{flag} has no effect at temperature 0; set a temperature or leave it out")
