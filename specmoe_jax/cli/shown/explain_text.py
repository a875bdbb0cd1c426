"""What `specmoe explain` says for people, in 80 columns: the advice, the presets beside each other."""

import textwrap
from typing import Any

from specmoe_jax.autotune.advice import PACKINGS, Advised, unused
from specmoe_jax.autotune.choose import Knowledge
from specmoe_jax.checkpoints.published.quantisation import Quantisation, is_built
from specmoe_jax.cli.flag_groups import plan_flags
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.packing.registry import LOSSLESS
from specmoe_jax.planner import explain
from specmoe_jax.planner.search import Choice
from specmoe_jax.support.units import GIB

WIDTH = 80
CONVERT = f"specmoe convert --format=specmoe --expert_packing={LOSSLESS}"
SHORT = {"link to accelerator": "link", "accelerator": "accel.", "cpu attention": "cpu"}  # of resources
# Columns of the presets: key, title, and what its values are divided by.
COLUMNS = (
    ("batch", "rows", 1), ("tokens_per_s", "tok/s", 1), ("iteration_s", "step ms", 1e-3), ("draft_s", "draft ms", 1e-3),
    ("tokens_per_step", "tok/step", 1), ("link_bytes_per_token", "MB/tok", 1e6), ("bytes x on_demand", "x demand", 1),
)  # fmt: skip


def as_text(shown: dict) -> str:
    """The document for people."""
    shown, advice, presets = dict(shown), shown.get("advice"), shown.get("presets")
    assumptions = shown.pop("assumptions")
    parts = []
    if advice is not None:
        parts += [advice_text(shown.pop("advice")), f"\nthe best for {[*advice][-1]} in full:"]
    if presets is not None:
        parts.append(presets_text(shown.pop("presets")))
    return "\n".join([*parts, explain.as_text(shown), lines_of("assumptions", assumptions)])


def advice(advised: list[Advised], config: ModelConfig, known: Knowledge) -> dict[str, Any]:
    """As a document: for each number of requests the plans, with their rates, bottlenecks and flags."""
    return {str(one.requests): _advised(one, config, known) for one in advised}


def _advised(one: Advised, config: ModelConfig, known: Knowledge) -> dict[str, Any]:
    shown: dict[str, Any] = {"best": _choice(one.best, config) | {"unused": unused(config, known, one.best)}}
    if one.runner_up is not None:
        shown["runner_up"] = _choice(one.runner_up, config)
    for name, choice in one.packed.items():
        if choice is not one.best:
            shown[name] = _choice(choice, config) | ({"first": CONVERT} if name == LOSSLESS else {})
    return shown


def _choice(choice: Choice, config: ModelConfig) -> dict[str, Any]:
    return {
        "tokens_per_s": choice.tokens_per_s,
        "binding_resource": choice.prediction.binding,
        "accelerator_gib": choice.prediction.account.accelerator_bytes / GIB,
        "host_gib": choice.prediction.account.host_bytes / GIB,
        "exact": choice.plan.expert_dtype not in PACKINGS,  # which makes the tokens another model's
        "flags": " ".join(plan_flags.as_flags(choice.plan, config)),
    }


def advice_text(shown: dict[str, Any]) -> str:
    """The advice for people. shown: what `advice` gives."""
    lines = []
    for requests, plans in shown.items():
        lines.append("one request at a time" if requests == "1" else f"a job of {requests} requests")
        for name, plan in plans.items():
            title = {"best": "best", "runner_up": "next"}.get(name, name)
            exactness = "" if plan["exact"] else "; not exact"
            rate = f"{_rate(plan['tokens_per_s']):>7} tokens/s, bound by the {plan['binding_resource']}"
            lines.append(f"  {title:<5} {rate}{exactness}")
            lines += textwrap.wrap(plan["flags"], WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False)
            if plan.get("first"):
                lines.append(f"{'':8}first: {plan['first']}")
            if plan.get("unused"):
                lines += textwrap.wrap(f"unused: {plan['unused']}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10)
    lines.append("run one: specmoe generate --model=DIR --prompts=FILE, and its flags")
    return "\n".join(lines)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def presets_text(presets: dict[str, dict[str, Any]]) -> str:
    """A line for each preset; what does not fit is marked, what cannot run says why below."""
    shown = {name: [_cell(row.get(key), scale) for key, _, scale in COLUMNS] for name, row in presets.items()}
    titles = [title for _, title, _ in COLUMNS]
    widths = [max(map(len, column)) for column in zip(titles, *shown.values(), strict=True)]
    names = max(map(len, presets))

    def line(name: str, cells: list[str], binding: str) -> str:
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{name:<{names}}  {numbers}  {binding}".rstrip()

    lines = [line("", titles, "bound by")]
    for name, cells in shown.items():
        binding = SHORT.get(presets[name].get("binding_resource", ""), presets[name].get("binding_resource", ""))
        lines.append(line(name, cells, f"{binding}{'' if presets[name].get('fits') else '*'}"))
    if any(not row.get("fits") for row in presets.values()):
        lines.append("* does not fit this machine: what it would be if it did")
    for name, row in presets.items():
        if "cannot run" in row:
            lines += textwrap.wrap(f"{name}: {row['cannot run']}", WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _cell(value: float | None, scale: float) -> str:
    if value is None:
        return "-"
    value = value / scale
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def lines_of(title: str, entries: list[str]) -> str:
    """A list as wrapped lines under a title."""
    wrapped = (textwrap.wrap(entry, WIDTH, initial_indent="  ", subsequent_indent="    ") for entry in entries)
    return "\n".join([f"{title}:", *(line for entry in wrapped for line in entry)])


def form_of(quantisation: Quantisation, config: ModelConfig) -> str:
    """How the weights are stored, and whether they can be loaded."""
    bits = "" if quantisation.bits is None else f", {quantisation.bits:.3g} bits a weight"
    loads = "whose experts stay packed" if is_built(quantisation, config) else "which this version does not load"
    return f"{quantisation.words}{bits}, {loads}"
