"""Shows the point in a minute: the same text without speculation and with it, over an emulated slow link.

Example:
    specmoe demo
    specmoe demo --model=DIR --prompt="Once upon a time" --verbose
"""

import sys
from typing import NamedTuple

from absl import flags

from specmoe_jax.checkpoints import load_model
from specmoe_jax.cli import common
from specmoe_jax.cli.shown.stats_table import table
from specmoe_jax.cli.shown.wrapped_text import WrappedText
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import UserError
from specmoe_jax.support.timing import Stopwatch

SYSTEMS = {
    "on_demand": "fetches the experts of every token",
    "specmoe": "drafts with resident experts, fetches once for several tokens",
}
TOKEN_S = 0.08  # of a token without speculation, on the link that is chosen: slow to read, and done in a few seconds

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_PROMPT = flags.DEFINE_string("prompt", "The captain looked at", "The prompt.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 40, "New tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.6, "0 is greedy.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 1, "Seed of the sampling.")
_LINK_GBPS = flags.DEFINE_float(
    "link_gbps", None, "The emulated link. Default: one on which a token without speculation takes 0.08 s."
)
_VERBOSE = flags.DEFINE_boolean("verbose", False, "All figures of both runs as well.")


class Ran(NamedTuple):
    """One system's run: its tokens, and the figures of Engine.stats."""

    token_ids: tuple[int, ...]
    stats: dict


def main() -> None:
    common.use_compile_cache()
    say(f"The same text twice over a slow link, without speculation and with it.\n\nloading {_MODEL.value} ...")
    watch = Stopwatch()
    model = load_model(_MODEL.value, progress="auto")
    if model.tokenizer is None:
        raise UserError(f"model {_MODEL.value} has no tokenizer, and the demo shows text; give another --model")
    load_s, config = watch.seconds, model.config
    link = chosen_link(model) if _LINK_GBPS.value is None else _LINK_GBPS.value * 1e9
    sizes = f"{config.num_layers} layers, {config.num_experts} experts, {config.experts_per_token} of them for a token"
    say(f"loaded in {load_s:.1f} s: {sizes}\nthe link that experts cross is emulated: {link / 1e9:.2g} GB/s\n")
    ran = {name: run(model, name, link) for name in SYSTEMS}
    say(summary(ran, link))
    if _VERBOSE.value:
        for name, found in ran.items():
            say(f"\n{name}\n{table(found.stats | {'load_s': load_s})}")
    if len({found.token_ids for found in ran.values()}) > 1:
        raise UserError("the two texts differ, which must not be: please report it with the output of specmoe doctor")


def say(text: str) -> None:
    print(text, flush=True)


def chosen_link(model: Model) -> float:
    """Bytes/s at which plain decoding spends TOKEN_S on the experts of a token."""
    return model.config.num_moe_layers * model.config.experts_per_token * model.expert_bytes / TOKEN_S


def chosen_plan(name: str, config: ModelConfig) -> Plan:
    """The preset; where hot experts draft, with half of a layer's: with a few of many one request saves little."""
    plan = preset(name, config)
    if not isinstance(plan.draft_experts, int):
        return plan
    return plan.replace(draft_experts=max(plan.draft_experts, config.num_experts // 2))


def run(model: Model, name: str, link: float) -> Ran:
    """Generates under a preset; the text appears as it is committed."""
    sampled = {"deterministic_sampling": True} if _TEMPERATURE.value else {}
    plan = chosen_plan(name, model.config).replace(batch_size=1, link_bytes_per_s=link, **sampled)
    params = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS.value, temperature=_TEMPERATURE.value, seed=_SEED.value, ignore_eos=True)
    stay = f"{plan.draft_experts} of {model.config.num_experts} experts of a layer stay\n" if plan.draft_experts else ""
    say(f"{name}: {SYSTEMS[name]}\n{stay}(compiles for some seconds where it never ran before)")
    engine, text, tokens = Engine(model, plan, progress="auto"), IncrementalText(model, (), _PROMPT.value), ()
    with WrappedText(sys.stdout, indent="  ") as shown:
        for event in engine.stream([_PROMPT.value], params):
            shown.write(text.push(event) if tokens else _PROMPT.value + text.push(event))
            tokens += event.token_ids
    return Ran(tokens, engine.stats())


def summary(ran: dict[str, Ran], link: float) -> str:
    """A row for each system, and what follows from them."""
    lines = [f"{'':<11}{'tokens/s':>10}{'tokens a step':>16}{'expert bytes a token':>23}"]
    for name, (_, stats) in ran.items():
        rate, step, sent = stats["decode_tokens_per_s"], stats["tokens_per_step"], stats["link_bytes_per_token"]
        lines.append(f"{name:<11}{rate:>10.1f}{step:>16.2f}{sent / 1e6:>20.2f} MB")
    slow, fast = (found.stats["decode_tokens_per_s"] for found in ran.values())
    tokens = [found.token_ids for found in ran.values()]
    same = "the same" if tokens[0] == tokens[1] else "NOT the same"
    lines.append(f"\n{fast / slow:.1f} times as fast, {same} {len(tokens[0])} tokens. SYNTHETIC: the link ({link / 1e9:.2g} GB/s).")
    lines.append("Your model on your machine: specmoe explain --model=DIR")
    return "\n".join(lines)
