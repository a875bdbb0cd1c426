"""The order of draft sets and of stand-ins (SpecMoE, Table II and Figure 16) with its errors; no clock is read.

    python -m specmoe_jax.benchmarks.studies.ideas.policies --model=demo --draft_experts=8 --batch=16 --seeds=8

Deterministic sampling at temperature 1: under one seed every plan writes the same text, so a difference of two plans is a mean of
differences seed by seed, and the error is that of such a mean.
"""

import json
import pathlib

import numpy as np
from absl import app, flags

import specmoe_jax as sm
from specmoe_jax.benchmarks.studies.ideas.evictions import texts

SETS = ("random", "hot_global", "hot_temporal", "decay", "accepted")
PAIRS = (
    ("hot_global", "random"), ("hot_temporal", "random"), ("hot_temporal", "hot_global"), ("decay", "hot_temporal"),
    ("accepted", "hot_temporal"), ("hot_temporal", "random stand-ins"),
)  # fmt: skip


def plans(model: sm.Model, draft_experts: int, draft_length: int) -> dict[str, sm.Plan]:
    base = sm.PRESETS["specmoe"](model.config).replace(
        draft_experts=draft_experts, draft_length=draft_length, deterministic_sampling=True, substitution="affinity"
    )
    return {name: base.replace(draft_set=name) for name in SETS} | {
        "random stand-ins": base.replace(draft_set="hot_temporal", substitution="random")
    }


def tokens_per_step(model: sm.Model, plan: sm.Plan, batch: int, tokens: int, seed: int) -> float:
    engine = sm.Engine(model, plan)
    engine.generate(texts(batch), sm.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=1.0, seed=seed))
    return engine.stats()["tokens_per_step"]


def mean_and_error(found: np.ndarray) -> tuple[float, float]:
    """Of independent figures: their mean and its standard error."""
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)


def as_text(found: dict[str, np.ndarray]) -> str:
    differences = {f"{one} - {other}": found[one] - found[other] for one, other in PAIRS}
    return "\n".join("{:<32} {:+.3f} +- {:.3f}".format(name, *mean_and_error(row)) for name, row in (found | differences).items())


def main(_) -> None:
    given = flags.FLAGS
    model, found = sm.load_model(given.model), {}
    for name, plan in plans(model, given.draft_experts, given.draft_length).items():
        counted = [tokens_per_step(model, plan, given.batch, given.tokens, seed) for seed in range(given.seeds)]
        found[name] = np.array(counted)
        print(f"{name}: {' '.join(f'{one:.2f}' for one in counted)}", flush=True)
    print(as_text(found))
    if given.output is not None:
        pathlib.Path(given.output).write_text(
            json.dumps({n: c.tolist() for n, c in found.items()}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    flags.DEFINE_string("model", "demo", "A checkpoint.")
    flags.DEFINE_integer("batch", 16, "Rows.")
    flags.DEFINE_integer("tokens", 48, "New tokens of each request.")
    flags.DEFINE_integer("draft_experts", 8, "N.")
    flags.DEFINE_integer("draft_length", 4, "Drafted tokens of a step.")
    flags.DEFINE_integer("seeds", 8, "Texts.", lower_bound=2)
    flags.DEFINE_string("output", None, "Where the figures go as JSON.")
    app.run(main)
