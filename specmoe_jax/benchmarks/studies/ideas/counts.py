"""The rows of the ablation counted: tokens per step, positions verified, bytes over the link; no clock is read.

    python -m specmoe_jax.benchmarks.studies.ideas.counts --model=demo --batches=1,4,16 --tokens=96 --rows=retain,stop
All rows have the same slots and generate the same text (deterministic sampling at temperature 1, or greedy).
"""

import json
import pathlib
from collections.abc import Iterator

from absl import app, flags

import specmoe_jax as sm
from specmoe_jax.benchmarks import ablation
from specmoe_jax.benchmarks.rounds import Job
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.benchmarks.studies.ideas.evictions import texts

SHOWN = ("tokens_per_step", "verified_per_step", "link_bytes_per_token", "steps", "foreseen_experts", "foreseen_needed_experts",
         "merge_link_bytes", "acceptance_by_position")  # fmt: skip


def count(setting: Setting, batch: int, tokens: int, temperature: float, rows: list[str]) -> Iterator[tuple[str, dict]]:
    """Of each row whose name holds one of `rows`; none for all."""
    params = sm.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=temperature, seed=1)
    for case in ablation.cases(setting, batch):
        if rows and not any(name in case.name for name in rows):
            continue
        plan = case.plan.replace(deterministic_sampling=temperature > 0, link_bytes_per_s=None)
        engine = sm.Engine(setting.model, plan)
        engine.generate(texts(batch), params)
        figures = engine.stats()
        yield f"{case.name} @ {batch}", {name: figures[name] for name in SHOWN}


def main(_) -> None:
    given, model = flags.FLAGS, sm.load_model(flags.FLAGS.model)
    batches, found = tuple(int(batch) for batch in given.batches), {}
    setting = Setting(model, 1e9, None, given.draft_experts, given.draft_length, batches, lambda batch: Job((), 1, 1), quick=False)
    for batch in batches:
        for name, row in count(setting, batch, given.tokens, given.temperature, given.rows):
            found[name] = row
            per_step, verified, sent = (row[key] for key in SHOWN[:3])
            print(f"{name:<32} {per_step:5.2f} tokens/step, {verified:5.2f} verified, {sent / 1e3:8.1f} kB/token", flush=True)
    if given.output is not None:
        pathlib.Path(given.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("model", "demo", "A checkpoint.")
    flags.DEFINE_list("batches", ["1", "4", "16"], "Batch sizes.")
    flags.DEFINE_integer("tokens", 96, "New tokens of each request.")
    flags.DEFINE_integer("draft_experts", 4, "N.")
    flags.DEFINE_integer("draft_length", 4, "Drafted tokens of a step, at most.")
    flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
    flags.DEFINE_list("rows", [], "Parts of the names of rows; default all.")
    flags.DEFINE_string("output", None, "Where the figures go as JSON.")
    app.run(main)
