"""What the engine does on several devices beside plain batches of the tiny model, on four CPU devices in a process of its own.

Run by test_devices_of_families.py. Arguments: a number of devices and names of FEATURES or of PAIRS; the last line is JSON, the
answers of each name on one device and on so many.
"""

import itertools
import json
import sys

from engine_cases import PROMPTS, plan, tokens_of
from test_family_presets import DRAFTED, FAMILIES, KEEPING, PARAMS, PLANS, REFUSED, expected, model_of, plan_of
from test_family_presets import PROMPTS as FAMILY_PROMPTS

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
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
    "scores": scores,
}
PLACES = [case for case in PLANS if "computed" not in case]
PAIRS = {
    f"{draft}, {case}": family(name, draft, case)
    for number, (draft, case) in enumerate(itertools.product(DRAFTED, PLACES))
    if case in DRAFTED[draft][1]
    for name in [[one for one in FAMILIES if (one, draft) != REFUSED][number % 4]]
}
"""Every draft in every flow, of a family with states, an indexer or caches of several shapes."""
assert set(KEEPING) < set(PLACES)


def main() -> None:
    devices, *names = sys.argv[1:]
    cases = FEATURES | PAIRS
    print(json.dumps({name: [cases[name](1), cases[name](int(devices))] for name in names}))


if __name__ == "__main__":
    main()
