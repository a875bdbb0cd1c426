"""Experts on several devices of one process: throughput with a link for each, and how evenly the links are loaded.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    python -m specmoe_jax.benchmarks.studies.several_devices --presets=on_demand
    python -m specmoe_jax.benchmarks.studies.several_devices --part=balance --model=nllb_shaped

throughput: 1, 2 and 4 devices with the same rows, in interleaved rounds; ratios are to one device. All have as many slots together.
The links are emulated, and so slow that the processor can follow: all devices are made of one CPU, which does n times what they do
not divide.
balance: bytes that each link brought, without an emulated rate, where expert e is of device e mod n and where popular experts are
spread. Popularity is counted on other prompts than those that are measured. The last line is one JSON document.
"""

import json

import jax
import numpy as np
from absl import app, flags

from specmoe_jax.benchmarks.rounds import Case, Job, compare
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.models.model import Model
from specmoe_jax.models.synthetic import SHAPES, shaped_model, synthetic_prompts
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import UserError

_PART = flags.DEFINE_enum("part", "throughput", ["throughput", "balance"], "What is measured.")
_MODEL = flags.DEFINE_string("model", "demo", "A checkpoint, or of nllb_shaped, qwen3_shaped: random, with a skewed routing.")
_PRESETS = flags.DEFINE_list("presets", ["on_demand", "specmoe", "streaming"], "Of throughput.")
_BATCHES = flags.DEFINE_list("batches", ["64"], "Rows; throughput takes the first.")
_COUNTS = flags.DEFINE_list("counts", ["1", "2", "4"], "Numbers of devices; throughput is over the first.")
_LINK_GBPS = flags.DEFINE_float("link_gbps", 0.005, "Of each emulated link.", lower_bound=1e-6)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 16, "Of every prompt.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "That count.", lower_bound=1)
_SETTLE = flags.DEFINE_integer("settle", 0, "Rounds before them; every program is compiled before the first.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 1, "Of a round of throughput, at least.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 24, "Of each request of balance, and of those that are counted.", lower_bound=2)


def main(argv: list[str]) -> None:
    counts = tuple(map(int, _COUNTS.value))
    if len(jax.devices()) < (most := max(counts)):
        said = f"this process has {len(jax.devices())} devices of {most}"
        raise UserError(f"{said}; set XLA_FLAGS=--xla_force_host_platform_device_count={most}")
    rows = max(map(int, _BATCHES.value))
    model = shaped_model(_MODEL.value) if _MODEL.value in SHAPES else load_model(_MODEL.value)
    prompts = prompts_of(model, 2 * rows)
    popularity = counted(model, prompts[rows:])
    if _PART.value == "balance":
        found = {batch: balance(model, prompts[: int(batch)], popularity, counts) for batch in _BATCHES.value}
    else:
        found = {name: throughput(model, name, prompts[:rows], popularity, counts) for name in _PRESETS.value}
    print(json.dumps({"model": _MODEL.value, "part": _PART.value, "rows": found}))


def prompts_of(model: Model, count: int) -> list[tuple[int, ...]]:
    """Of equal length: passages of the bundled text, or random ones."""
    length = _PROMPT_TOKENS.value
    if model.tokenizer is None:
        return [tuple(prompt)[:length] for prompt in synthetic_prompts(model.config, count, length)]
    ids = model.tokenizer.encode((BUNDLED["demo"] / "held_out.txt").read_text(encoding="utf-8"))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [tuple(ids[start : start + length]) for start in starts]


def counted(model: Model, prompts: list[tuple[int, ...]]) -> np.ndarray:
    """[L, E], choices of the tokens that the model generates."""
    engine = Engine(model, preset("on_demand", model.config).replace(batch_size=len(prompts)), routing="ids")
    counts = np.zeros((model.config.num_moe_layers, model.config.num_experts), np.int64)
    for done in engine.generate(prompts, SamplingParams(max_new_tokens=_NEW_TOKENS.value, ignore_eos=True)):
        assert done.routing is not None
        ids = done.routing.ids[done.routing.prompt_tokens :]
        np.add.at(counts, (np.arange(ids.shape[1])[:, None], ids), 1)
    return counts


def throughput(model: Model, name: str, prompts: list[tuple[int, ...]], popularity: np.ndarray, counts: tuple[int, ...]) -> dict:
    """Of a preset by the number of devices, and once more on the most with popular experts spread where that has a meaning."""
    base = preset(name, model.config).replace(batch_size=len(prompts), link_bytes_per_s=_LINK_GBPS.value * 1e9)
    base = base.replace(pinned_layers=0) if base.flow.streams_layers else base
    cases = [Case(str(count), base.replace(devices=count), str(counts[0])) for count in counts]
    if base.flow.keeps_experts:
        spread = cases[-1].plan.replace(placement="popularity")
        cases.append(Case(f"{counts[-1]}, popularity", spread, str(counts[0]), popularity=popularity))
    job = Job(prompts=prompts, rounds=_ROUNDS.value, tokens=1, settle=_SETTLE.value, steps=_STEPS.value, progress="log")
    table = compare(model, cases, job)
    for case in cases:
        row, figures = table[case.name], table[case.name]["ratios"]["decode_tokens_per_s"]
        each = [round(sent / row["steps"] / 1e6, 3) for sent in row["device_link_bytes"]]
        said = f"{row['decode_tokens_per_s']:.3f} tok/s, {row['step_latency_s']:.2f} s a step, x {[round(x, 2) for x in figures]}"
        print(f"{name}, {case.name}: {said}, {slots(case.plan, model)} slots, MB a step {each}, max/mean {row['link_balance']:.3f}")
    return table


def slots(plan: Plan, model: Model) -> int:
    """Of all devices together."""
    return plan.devices * account(model.config, plan, batch_rows=plan.batch_size, positions=64).num_slots


def balance(model: Model, prompts: list[tuple[int, ...]], popularity: np.ndarray, counts: tuple[int, ...]) -> dict:
    """Of on_demand, which brings what is needed and nothing else, by placement and number of devices."""
    found, params = {}, SamplingParams(max_new_tokens=_NEW_TOKENS.value, ignore_eos=True)
    for count in counts[1:]:
        for name in ("modulo", "popularity"):
            plan = preset("on_demand", model.config).replace(batch_size=len(prompts), devices=count, placement=name)
            engine, steps = Engine(model, plan, popularity=popularity if plan.placing.by_popularity else None), []
            engine.generate(prompts, params, on_step=steps.append)
            sent = np.array([step.device_link_bytes for step in steps])
            sums = sent.sum(axis=0)
            row = {
                "device_link_bytes": sums.tolist(),
                "balance": float(sums.max() / sums.mean()),
                "step_balance": float((sent.max(axis=1) / sent.mean(axis=1)).mean()),
            }
            print(f"{len(prompts)} rows, {count} devices, {name}: {row}", flush=True)
            found[f"{count}, {name}"] = row
    return found


if __name__ == "__main__":
    app.run(main)
