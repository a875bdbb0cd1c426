"""Presets side by side in one process on one model, in interleaved rounds; the last line is one JSON document.

Example:
    specmoe benchmark --suite=specmoe --model=nllb_shaped --tables=batches --link_gbps=0.02
Columns: tok/s of the decoding, job tok/s of whole jobs; kB/tok: expert bytes over the link per token; floor: share of the roofline
bound (floor s); wasted: of the prefetched bytes; growth: bytes for one token of every row, over the smallest batch's;
x caching: speed over that preset's, x cache: over the best cache (ablation); verified: positions of a row in a step;
link s, compute s: of a step alone, x floor and x sum: a step over their maximum and their sum;
acc. 1, ...: share of rows whose first, second, ... drafted token was accepted; CPU rows, moves: of a split draft cache; MiB acc.:
peak of the accelerator. Speed and bytes are ratios to the named base: median (least-most) of the rounds. Empty columns are left
out.
"""

import json
import os
import pathlib
import platform
import sys

import jax
import numpy as np
from absl import flags

from specmoe_jax.benchmarks import plots, specmoe, specmoeoff
from specmoe_jax.benchmarks.categories import BUNDLED as CATEGORIES
from specmoe_jax.benchmarks.categories import read_categories
from specmoe_jax.benchmarks.rounds import Job
from specmoe_jax.checkpoints import load_head, load_model
from specmoe_jax.checkpoints.eagle import bundled_head
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.checkpoints.mtp import holds_mtp, load_mtp
from specmoe_jax.cli import common
from specmoe_jax.cli.shown.benchmark_table import as_text
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.models.model import Model
from specmoe_jax.models.synthetic import SHAPES, shaped_model, synthetic_prompts
from specmoe_jax.support.errors import RequestError, UserError
from specmoe_jax.support.progress import PROGRESS

_SUITES = {"specmoe": specmoe, "specmoeoff": specmoeoff}
_SUITE = flags.DEFINE_enum("suite", "specmoe", list(_SUITES), "Which tables.")
_TABLES = flags.DEFINE_list("tables", None, "Some of the suite's tables; default all but categories, ablation and kinds.")
_MODEL = flags.DEFINE_string(
    "model", "demo", '"demo", "nllb_shaped", "qwen3_shaped", "mixtral_shaped" (random; synthetic acceptance) or a checkpoint.'
)
_DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head (specmoeoff); default: the bundled model's.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 256, "Tokens of a prompt where they are not swept (specmoeoff).")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "A .txt or .jsonl file; default: the held-out text of the bundled model. For --tables=categories JSON lines with category and "
    "prompt (or turns); default: 48 bundled ones.",
)
_BATCHES = flags.DEFINE_list("batches", None, "Batch sizes; default 1,4,16,64, of a random model 256 too.")
_LINK_GBPS = flags.DEFINE_float("link_gbps", 0.02, "Rate of the emulated link, in GB/s; small against the compute.")
_DRAFT_EXPERTS = flags.DEFINE_integer("draft_experts", 4, "N where it is not swept.")
_DRAFT_LENGTH = flags.DEFINE_integer("draft_length", None, "Draft length where it is not swept; default 4, nllb_shaped 10.")
_ACCEPTANCE = flags.DEFINE_float(
    "synthetic_acceptance", None, "Stamped on every figure; default none, nllb_shaped 0.913, qwen3_shaped 0.342."
)
_SKEW = flags.DEFINE_float("skew", None, "Gini coefficient of the expert counts; default nllb_shaped 0.84, qwen3_shaped 0.4.")
_TOPIC_SHARE = flags.DEFINE_float("topic_share", 0.5, "How much of the routing stays within a request (random models).")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved rounds.")
_TOKENS = flags.DEFINE_integer("tokens", 16, "New tokens per request and round.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps per round at least.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy, where small models soon repeat themselves.")
_QUICK = flags.DEFINE_boolean("quick", False, "One short round, the ends of every sweep.")
_PLOTS = flags.DEFINE_string("plots", None, "A folder for SVGs (needs matplotlib: the [plot] extra).")
_OUTPUT = flags.DEFINE_string("output", None, "Where the JSON document goes too.")
_PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
_APPEND = flags.DEFINE_boolean("append", False, "Keep the rows that --output holds already; those measured again replace theirs.")


def main() -> None:
    common.use_compile_cache()
    suite = _SUITES[_SUITE.value]
    setting = make_setting() if suite is specmoe else make_streaming_setting()
    if _APPEND.value and _OUTPUT.value is None:
        raise UserError("--append has no effect without --output; give both or neither")
    before = json.loads(pathlib.Path(_OUTPUT.value).read_text())["tables"] if _APPEND.value and _OUTPUT.value else {}
    tables = dict(before)
    for name in choose_tables():
        print(f"\n{name}: {suite.TABLES[name].__doc__.splitlines()[0]}", flush=True)
        rows = before.get(name, {}) | suite.TABLES[name](setting)
        tables[name] = specmoe.with_growth(rows) if suite is specmoe else rows
        print(as_text(tables[name]), flush=True)
    document = {
        "suite": _SUITE.value,
        "command": " ".join(["specmoe", "benchmark", *sys.argv[1:]]),
        "machine": machine(),
        "model": _MODEL.value,
        "tables": tables,
    }
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if _PLOTS.value:
        plots.save(document, pathlib.Path(_PLOTS.value))
    print(json.dumps(document))


def choose_tables() -> list[str]:
    known = _SUITES[_SUITE.value].TABLES
    on_request = specmoe.ON_REQUEST if _SUITES[_SUITE.value] is specmoe else ()
    names = _TABLES.value or [name for name in known if name not in on_request]
    for name in names:
        if name not in known:
            common.usage_error(f"tables has {name!r}; suite {_SUITE.value} has {', '.join(known)}")
    if "categories" in names and _BATCHES.value:
        common.usage_error("--batches has no effect on --tables=categories, whose batch is a category's prompts; leave it out")
    if "categories" in names and len(names) > 1 and _PROMPTS.value:
        common.usage_error("--prompts of --tables=categories is another file than the other tables'; run them one after the other")
    return names


def make_setting() -> specmoe.Setting:
    synthetic = SHAPES.get(_MODEL.value)
    if synthetic:
        model = shaped_model(_MODEL.value, skew=_SKEW.value, topic_share=_TOPIC_SHARE.value)
    else:
        for name in ("skew", "topic_share"):
            if flags.FLAGS[name].present:
                common.usage_error(f"--{name} has no effect on --model={_MODEL.value}, which is not random; leave it out")
        model = load_model(_MODEL.value)
    default_batches = ["1", "4", "16", "64", "256"] if synthetic else ["1", "4", "16", "64"]
    tables = choose_tables()
    by_kind = "categories" in tables
    sizes = tuple(int(size) for size in _BATCHES.value or default_batches)
    if by_kind and synthetic:
        common.usage_error(f"--tables=categories needs a model that reads text, and {_MODEL.value} is random; give a checkpoint")
    alone = tables == ["categories"]  # whose prompts are texts of another form
    prompts = synthetic_prompts(model.config, max(sizes), 17) if synthetic else () if alone else real_prompts(max(sizes))
    acceptance = _ACCEPTANCE.value
    if acceptance is None and synthetic:
        acceptance = synthetic.acceptance
    return specmoe.Setting(
        model=model,
        link_bytes_per_s=_LINK_GBPS.value * 1e9,
        acceptance=acceptance,
        experts=_DRAFT_EXPERTS.value,
        length=_DRAFT_LENGTH.value or (synthetic.draft_length if synthetic else 4),
        batches=(min(sizes), max(sizes)) if _QUICK.value and len(sizes) > 2 else sizes,
        job=lambda batch: Job(
            prompts=prompts[:batch],
            rounds=1 if _QUICK.value else _ROUNDS.value,
            tokens=min(4, _TOKENS.value) if _QUICK.value else _TOKENS.value,
            steps=_STEPS.value,
            temperature=_TEMPERATURE.value,
            progress=_PROGRESS.value,
        ),
        quick=_QUICK.value,
        categories=read_categories(_PROMPTS.value or CATEGORIES) if by_kind else {},
        heads=own_heads(model) if by_kind or "kinds" in tables else {},
    )


def own_heads(model: Model) -> dict:
    """Of the drafts that come with the model: its MTP layer, and the EAGLE head that --draft_head names or that is bundled."""
    heads = {}
    if model.path is not None and holds_mtp(model.config, open_checkpoint(model.path)):
        heads["mtp"] = load_mtp(model)
    if eagle := _DRAFT_HEAD.value or bundled_head(_MODEL.value):
        heads["eagle"] = load_head(eagle, model)
    return heads


def make_streaming_setting() -> specmoeoff.Setting:
    synthetic = _MODEL.value == "mixtral_shaped"
    if synthetic:
        model, head = specmoeoff.mixtral_shaped()
    else:
        model = load_model(_MODEL.value)
        head = load_head(_DRAFT_HEAD.value or _MODEL.value, model)
    sizes = tuple(int(size) for size in _BATCHES.value or ["8", "32", "64"])
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, model.config.vocab_size, (max(sizes), model.config.max_positions))
    texts = None if synthetic else [model.tokenizer.encode(text) for text in real_prompts(max(sizes))]

    def prompts(batch: int, tokens: int) -> list:
        """Random ids, or as much of the texts as there is: acceptance on noise is meaningless."""
        given = token_ids[:, :tokens].tolist() if texts is None else [text[:tokens] for text in texts]
        return [tuple(ids) for ids in given[:batch]]

    return specmoeoff.Setting(
        model=model,
        head=head,
        link_bytes_per_s=_LINK_GBPS.value * 1e9,
        synthetic=synthetic,
        length=_DRAFT_LENGTH.value or 5,
        batches=(min(sizes), max(sizes)) if _QUICK.value and len(sizes) > 2 else sizes,
        prompt=_PROMPT_TOKENS.value,
        job=lambda batch, tokens: Job(
            prompts=prompts(batch, tokens),
            rounds=1 if _QUICK.value else _ROUNDS.value,
            tokens=min(4, _TOKENS.value) if _QUICK.value else _TOKENS.value,
            steps=_STEPS.value,
            temperature=_TEMPERATURE.value,
            progress=_PROGRESS.value,
        ),
        quick=_QUICK.value,
    )


def real_prompts(count: int) -> list[str]:
    """Texts of the file, again from its start where there are too few."""
    path = _PROMPTS.value
    if path is None:
        path = BUNDLED["demo"] / "held_out.txt"
    texts = [prompt.text for prompt in read_prompts(str(path), SamplingParams())]
    if not texts:
        raise RequestError(f"{path} holds no prompt")
    return [texts[i % len(texts)] for i in range(count)]


def machine() -> dict:
    device = jax.local_devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "cpu_count": os.cpu_count(),
        "architecture": platform.machine(),
        "jax": jax.__version__,
    }
