"""docs/advice.md: what is recommended for ten machine and model pairs.

Written anew with `python -m tests.planner.test_advice_table`.

The search takes minutes, so a test checks the plans that are written down: each is predicted again, and its rate is compared with
arithmetic from the model's sizes and the machine's rates alone.
"""

import json
import pathlib
from typing import NamedTuple

import pytest

from specmoe_jax.autotune.advice import advise, unused
from specmoe_jax.autotune.choose import Knowledge, evaluate
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.packing.registry import LOSSLESS
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.search import Choice
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.units import GIB
from tests.planner.synthetic_headers import CONFIGS

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE, DOCUMENT = DOCS / "advice.md", DOCS / "advice.json"
PAIRS = (
    ("qwen3_30b_a3b", "4090"), ("qwen3_30b_a3b", "a100"), ("qwen3_30b_a3b", "h100"),
    ("gpt_oss_120b", "4090"), ("gpt_oss_120b", "a100"), ("gpt_oss_120b", "h100"),
    ("mixtral_8x7b", "4090"), ("mixtral_8x7b", "t4"), ("nllb_moe_54b", "l4"), ("deepseek_v2_lite", "tpu_v5e"),
)  # fmt: skip
TITLES = {
    "qwen3_30b_a3b": "Qwen3-30B-A3B", "gpt_oss_120b": "gpt-oss-120b", "mixtral_8x7b": "Mixtral-8x7B",
    "nllb_moe_54b": "NLLB-MoE-54B", "deepseek_v2_lite": "DeepSeek-V2-Lite",
}  # fmt: skip
HEAD = """# What is recommended where

`specmoe explain --model=DIR --hardware=NAME` for ten pairs: prompts of 512 tokens, 128 new ones, bfloat16.
**Predictions from data sheets, not measurements** ([planner](planner.md)); the hosts are assumed ([machines](machines.md)),
and so is the acceptance of `draft=self` (0.6 a token). `int8` and `int4` pack the experts anew, which changes the model's
numbers (gpt-oss is published in MXFP4 and stays so: exact). `lossless` is the same weights in 12 bits, after a conversion
([how](checkpoints.md#experts-in-12-bits-without-loss)): exact. They are named where the exact plan leaves experts off the
accelerator and they are faster than it. Written by `python -m tests.planner.test_advice_table`; the plans in full:
[advice.json](advice.json).

| model | machine | requests | exact plan | tokens/s | bound by | packed experts, tokens/s |
|---|---|---|---|---|---|---|
"""
UNSAID = {"micro_batches": (1,), "prefetch": ("none",), "retain": (False,)}
SHOWN = ("draft_experts", "draft_length", "cached_experts", "retain", "prefetch", "micro_batches", "batch_size")


class Row(NamedTuple):
    """plans: by name (exact, lossless, int8, int4): the plan, its tokens/s of a job and its bottleneck."""

    model: str
    machine: str
    requests: int
    plans: dict[str, dict]
    unused: str | None


def known_of(model: str, name: str) -> tuple[ModelConfig, Knowledge]:
    config = parse_config(CONFIGS[model]).with_packing("mxfp4" if "quantization_config" in CONFIGS[model] else None)
    encoder = config.encoder is not None
    workload = Workload(prompt_tokens=1 if encoder else 512, source_tokens=512 if encoder else 0, new_tokens=128)
    return config, Knowledge(machine(name), workload)


def row(model: str, name: str, requests: int) -> Row:
    config, known = known_of(model, name)
    found = advise(config, known, requests=requests, fixed={"dtype": "bfloat16"})
    plans = {"exact": found.best} if found.best.plan.expert_dtype is None else {}
    return Row(model, name, requests, {k: _plan(v) for k, v in (plans | found.packed).items()}, unused(config, known, found.best))


def _plan(choice: Choice) -> dict:
    return {"tokens_per_s": choice.tokens_per_s, "bound_by": choice.prediction.binding, "plan": json.loads(choice.plan.to_json())}


def line(found: Row) -> str:
    hardware, exact = machine(found.machine), found.plans.get("exact")
    host = f"{hardware.host_memory_bytes / GIB:.0f} GiB host"
    others = {name: plan for name, plan in found.plans.items() if name != "exact"}
    packed = ", ".join(f"{name} {rate(plan['tokens_per_s'])} ({flow(plan['plan'])})" for name, plan in others.items())
    cells = (described(exact["plan"]), rate(exact["tokens_per_s"]), exact["bound_by"]) if exact else ("none fits", "", "")
    return f"| {TITLES[found.model]} | {hardware.name}, {host} | {found.requests} | {' | '.join(cells)} | {packed} |\n"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def flow(plan: dict) -> str:
    return "resident" if plan["expert_flow"] == "resident" else plan["preset"]


def described(plan: dict) -> str:
    given = [f"{name}={plan[name]}" for name in SHOWN if plan[name] not in (None, *UNSAID.get(name, ()))]
    tier = ["expert_tier=disk"] if plan["expert_tier"] == "disk" else []
    return f"`{' '.join([flow(plan), *given, *tier]).replace('=True', '')}`"


def written() -> list[Row]:
    return [Row(**found) for found in json.loads(DOCUMENT.read_text())]


def test_the_page_is_the_document():
    rows = written()
    assert [(found.model, found.machine) for found in rows] == [pair for pair in PAIRS for _ in range(2)]
    assert PAGE.read_text(encoding="utf-8") == HEAD + "".join(map(line, rows))


@pytest.mark.parametrize("requests", [1, 64])
def test_recommendations_hold_and_agree_with_arithmetic(requests):
    """Each plan is predicted again; a step cannot be faster than what its bottleneck has to move or read."""
    for found in written():
        for name, said in found.plans.items() if found.requests == requests else ():
            config, known = known_of(found.model, found.machine)
            config = config.with_packing(LOSSLESS) if name == LOSSLESS else config
            plan = Plan.from_json(json.dumps(said["plan"]))
            prediction = evaluate(config, plan, known)
            assert said["bound_by"] == prediction.binding
            assert 0.4 * prediction.tokens_per_s < said["tokens_per_s"] <= prediction.tokens_per_s * 1.001  # rows that end early
            assert prediction.account.accelerator_bytes <= known.hardware.accelerator_memory_bytes
            assert prediction.account.host_bytes <= known.hardware.host_memory_bytes
            assert prediction.iteration_s >= bottleneck_s(config, plan, known, prediction) * 0.999


def bottleneck_s(config: ModelConfig, plan: Plan, known: Knowledge, prediction) -> float:
    """Of a step: the bytes over the link at the link's rate, and the weights that every token reads at the memory's."""
    hardware, tokens = known.hardware, prediction.rows * prediction.tokens_per_step
    link_s = prediction.link_bytes_per_token * tokens / hardware.up_bytes_per_s
    expert_bytes = prediction.account.expert_bytes
    read = config.num_moe_layers * config.experts_per_token * expert_bytes  # by one token at least
    return max(link_s, read / hardware.accelerator_bytes_per_s)


def test_the_figures_that_started_it():
    """Qwen3-30B on a 4090D: int4 experts all fit, some 145 tokens/s for one request, where 1.7 GB are read for a token."""
    config, _ = known_of("qwen3_30b_a3b", "4090")
    known = Knowledge(machine("4090d"), Workload())
    plan = Plan("resident", expert_flow="resident", dtype="bfloat16", expert_dtype="int4", batch_size=1)
    prediction = evaluate(config, plan, known)
    active = 48 * 8 * prediction.account.expert_bytes + 2.9 * GIB - 151_936 * 2048 * 2  # without the embedding's table
    by_hand = 0.8 * known.hardware.accelerator_bytes_per_s / active
    assert by_hand / 2 < prediction.tokens_per_s < by_hand  # the rest are programs and attention


if __name__ == "__main__":
    rows = [row(*pair, requests) for pair in PAIRS for requests in (1, 64)]  # some minutes
    DOCUMENT.write_text(json.dumps([found._asdict() for found in rows], indent=1) + "\n")
    PAGE.write_text(HEAD + "".join(map(line, rows)), encoding="utf-8")
