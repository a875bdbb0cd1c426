"""Experts on disk, a share of them cached in host memory: systems side by side in interleaved rounds; last line JSON.

Example:
    specmoe convert --model=demo --output=demo_mapped --format=specmoe --dtype=float32
    specmoe benchmark_disk --model=demo_mapped --share=0.333
Every read is one of the disk: the system's page cache is bypassed. Speed is relative to on_demand with the same policy.
"""

import json
import sys

from absl import flags

from specmoe_jax.benchmarks import rounds
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.cli import common
from specmoe_jax.cli.shown.benchmark_table import folded
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.registry import HOST_CACHE_POLICIES
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import RequestError

_MODEL = flags.DEFINE_string("model", "demo", '"demo" or a checkpoint; --format=specmoe ones need no conversion.')
_SHARE = flags.DEFINE_float("share", 1 / 3, "Host memory for experts, as a share of all of them.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Batch sizes.")
_POLICIES = flags.DEFINE_list("policies", list(HOST_CACHE_POLICIES), "Of the cache in host memory.")
_DRAFT_LENGTH = flags.DEFINE_integer("draft_length", 4, "Tokens drafted per step.")
_DRAFT_EXPERTS = flags.DEFINE_integer("draft_experts", 4, "Resident draft experts per layer.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.")
_TOKENS = flags.DEFINE_integer("tokens", 16, "New tokens per request and round.")


def main() -> None:
    common.use_compile_cache()
    model = load_model(_MODEL.value, expert_tier="disk")
    tables = {}
    for batch in map(int, _BATCHES.value):
        prompts = read_held_out(batch)
        check_tokens(model, prompts)
        job = rounds.Job(prompts=prompts, rounds=_ROUNDS.value, tokens=_TOKENS.value, progress=True)
        tables[batch] = rounds.compare(model, make_cases(model, batch), job)
        print(as_text(batch, tables[batch]), flush=True)
    command = " ".join(["specmoe", "benchmark_disk", *sys.argv[1:]])
    print(json.dumps({"command": command, "model": _MODEL.value, "share": _SHARE.value, "tables": tables}))


def make_cases(model: Model, batch: int) -> list[rounds.Case]:
    """Per policy the baselines and SpecMoE, with and without reading ahead what the draft's gates chose."""
    cases = []
    for policy in _POLICIES.value:
        changes = {
            "expert_tier": "disk",
            "host_memory_bytes": _SHARE.value * model.expert_bytes * model.config.num_moe_layers * model.config.num_experts,
            "dram_policy": policy,
            "bypass_page_cache": True,
            "batch_size": batch,
        }
        on_demand, caching = (preset(name, model.config).replace(**changes) for name in ("on_demand", "caching"))
        draft = {"draft": "self", "draft_length": _DRAFT_LENGTH.value, "draft_experts": _DRAFT_EXPERTS.value}
        specmoe = on_demand.replace(preset="specmoe", **draft)
        base = f"on_demand, {policy}"
        cases += [
            rounds.Case(base, on_demand),
            rounds.Case(f"caching, {policy}", caching, base),
            rounds.Case(f"specmoe, {policy}", specmoe, base),
            rounds.Case(f"specmoe, read ahead, {policy}", specmoe.replace(prefetch="draft"), base),
        ]
    return cases


def check_tokens(model: Model, prompts: list[str]) -> None:
    """Every case gives the tokens of the resident model, or RequestError."""
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    in_memory = load_model(_MODEL.value)
    wanted = tokens_of(in_memory, preset("resident", model.config).replace(batch_size=len(prompts)), prompts, params)
    for case in make_cases(model, len(prompts)):
        if tokens_of(model, case.plan, prompts, params) != wanted:
            raise RequestError(f"{case.name}: other tokens than the resident model's; please report this")


def tokens_of(model: Model, plan: Plan, prompts: list[str], params: SamplingParams) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in Engine(model, plan).generate(prompts, params)]


def read_held_out(count: int) -> list[str]:
    """Text that the bundled model was not trained on, again from its start where there is too little."""
    path = BUNDLED["demo"] / "held_out.txt"
    texts = [prompt.text for prompt in read_prompts(str(path), SamplingParams())]
    return [texts[i % len(texts)] for i in range(count)]


def as_text(batch: int, rows: dict[str, dict]) -> str:
    """A table for people; speed is a paired ratio, median and range."""
    columns = [
        ["speed x on_demand", *(_range(row["ratios"]) for row in rows.values())],
        ["tok/s", *(f"{row['decode_tokens_per_s']:.1f}" for row in rows.values())],
        ["tok/step", *(f"{row['tokens_per_step']:.2f}" for row in rows.values())],
        ["disk kB/tok", *(f"{row['disk_bytes_per_token'] / 1e3:.0f}" for row in rows.values())],
        ["link kB/tok", *(f"{row['link_bytes_per_token'] / 1e3:.0f}" for row in rows.values())],
        ["host hits", *map(_hits, rows.values())],
    ]
    return "\n".join([f"batch {batch}", *folded(["", *rows], columns)])


def _range(ratios: dict | None) -> str:
    if not ratios:
        return "-"
    median, least, most = ratios["decode_tokens_per_s"]
    return f"{median:.2f} ({least:.2f}-{most:.2f})"


def _hits(row: dict) -> str:
    demanded = row["dram_hits"] + row["dram_misses"]
    return f"{row['dram_hits'] / demanded:.2f}" if demanded else "-"
