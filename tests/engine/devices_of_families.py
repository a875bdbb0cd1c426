"""What the engine does on several devices beside plain batches of the tiny model, on four CPU devices in a process of its own.

Run by test_devices_of_families.py. Arguments: a number of devices and names of CASES; the last line is JSON, the
answers of each name on one device and on so many.
"""

import itertools
import json
import sys

from engine_cases import PROMPTS, plan, tokens_of
from test_family_presets import DRAFTED, PARAMS, REFUSED, expected, model_of, plan_of
from test_family_presets import PROMPTS as FAMILY_PROMPTS

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models.quantised import quantise
from specmoe_jax.testing import tiny
from specmoe_jax.testing.families import tiny_family


def family(name: str, draft: str, case: str):
    """Tokens, with a draft in a flow."""

    def answers(devices: int):
        model, own = model_of(name), plan_of(name, draft, case)
        given = {"draft_model": model} if draft == "model" else DRAFTS.executor(own.draft).random_inputs(model)
        if devices == 1:
            return expected(name)
        return tokens_of(sm.Engine(model, own.replace(devices=devices), **given).generate(FAMILY_PROMPTS, PARAMS))

    return answers


def encoder(devices: int):
    """Of sources that are as long as the prompts; without a draft and with the target's own experts."""
    model = tiny_family("nllb_moe")
    own = sm.PRESETS["specmoe"](model.config).replace(batch_size=2, draft_length=2, draft_experts=2, devices=devices)
    return tokens_of(sm.Engine(model, own).generate(FAMILY_PROMPTS, PARAMS))


def service(devices: int):
    """Requests that join while others run."""
    own = sm.Engine(tiny(), plan("specmoe", batch_size=2, draft_experts=2, draft_length=2, devices=devices)).service(max_tokens=64)
    first = [own.submit(list(prompt), PARAMS) for prompt in PROMPTS[:3]]
    answers = [first[0].result().token_ids]
    second = [own.submit(list(prompt), PARAMS) for prompt in PROMPTS[3:5]]
    return [*answers, *(handle.result().token_ids for handle in (*first[1:], *second))]


def packed(devices: int):
    """Dense matrices in int8, also the output matrix that a draft borrows."""
    model = quantise(tiny_family("glm4_moe"), dense_dtype="int8")
    own = sm.PRESETS["on_demand"](model.config).replace(
        batch_size=2, draft="mtp", draft_length=2, dense_dtype="int8", devices=devices
    )
    engine = sm.Engine(model, own, **DRAFTS.executor("mtp").random_inputs(model))
    return tokens_of(engine.generate(FAMILY_PROMPTS, PARAMS))


def scores(devices: int):
    """Log-probabilities, of batches and of streamed passes."""
    pairs = [(PROMPTS[1], PROMPTS[3]), (PROMPTS[1], PROMPTS[5]), (PROMPTS[2], PROMPTS[0])]
    found = []
    for preset in ("on_demand", "streaming"):
        done = sm.Engine(tiny(), plan(preset, batch_size=2, devices=devices)).score(pairs)
        found += [logprob for one in done for logprob in one.logprobs]
    return found


FEATURES = {
    "recurrent layers": family("qwen3_next", "self", "on_demand"),
    "a service": service,
    "an indexer": family("deepseek_v32", "ngram", "streaming"),
    "an MTP chain": family("deepseek_v32", "mtp", "on_demand"),
    "an MTP tree": family("qwen3_next", "mtp tree", "caching"),
    "prompt lookup": family("mimo_v2_flash", "ngram", "on_demand host"),
    "an encoder": encoder,
    "packed matrices": packed,
    "scores": scores,
}
KINDS = (("deepseek_v32", "glm_moe_dsa"), ("qwen3_next", "qwen3_5_moe"), ("mimo_v2_flash",))
"""Families with an indexer, with states, and with caches of several shapes."""


def place(draft: str, turn: int) -> str:
    """A flow and tier that the draft goes with, in turn."""
    places = [case for case in DRAFTED[draft][1] if "computed" not in case]
    return places[turn % len(places)]


PAIRS = {
    (name, draft): place(draft, number + 2 * kind)
    for (number, draft), (kind, names) in itertools.product(enumerate(DRAFTED), enumerate(KINDS))
    if (name := names[number % len(names)], draft) != REFUSED
}
"""Every draft of every kind of family; the flows go round (devices_of_presets.py has every draft in every flow)."""
CASES = FEATURES | {f"{name}, {draft}": family(name, draft, case) for (name, draft), case in PAIRS.items()}


def main() -> None:
    devices, *names = sys.argv[1:]
    print(json.dumps({name: [CASES[name](1), CASES[name](int(devices))] for name in names}))


if __name__ == "__main__":
    main()
