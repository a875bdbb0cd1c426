"""Every preset with every draft on several devices, in one process that has four. Run by test_devices_of_presets.py.

Argument: a number of devices; the last line is JSON, the tokens of each case. The model is small, of layers that are alike, so
that cases share programs: five experts, of which no number of devices has equal parts.
"""

import functools
import json
import sys

import numpy as np
from engine_cases import ScriptedDraft, tokens_of

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models import mtp
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.testing.families import RAW_CONFIGS

ALIKE = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "n_routed_experts": 5, "num_experts_per_tok": 2}
PROMPTS = tuple(tuple(int(t) for t in np.random.default_rng([9, i]).integers(3, 131, n)) for i, n in enumerate((9, 1, 14, 4)))
GREEDY = sm.SamplingParams(max_new_tokens=4, ignore_eos=True)
SAMPLED = sm.SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.9, top_p=0.95, seed=3)
PARAMS = (GREEDY, GREEDY, SAMPLED, SAMPLED)  # of a batch of two: first greedy rows, then sampled ones

# Batches that are ragged, of fewer rows than there are prompts: a second batch or, of a stream, refills.
PRESETS = {name: {"batch_size": 2} for name in sm.PRESETS} | {
    "overlap": {"batch_size": 2, "link_bytes_per_s": 1e12},
    "specmoeoff": {"batch_size": 2, "micro_batches": 2},
}
TREE = {"draft_length": 2, "draft_tree_top_k": 2, "draft_tree_tokens": 4}
CHAIN = {"draft_length": 2}
DRAFTED = {
    "none": {},
    "self": CHAIN | {"draft_experts": 2},
    "merged": CHAIN | {"draft_experts": 2, "merge_every": 2},
    "eagle": CHAIN,
    "eagle tree": TREE,
    "mtp": CHAIN,
    "mtp tree": TREE,
    "mtp hot": CHAIN | {"draft_experts": 3},
    "ngram": CHAIN,
    "model": CHAIN,
    "custom": CHAIN,
}


@functools.cache
def model() -> Model:
    return random_model(parse_config(RAW_CONFIGS["glm4_moe"] | ALIKE))


def plan_of(preset: str, draft: str, devices: int) -> sm.Plan:
    none = dict.fromkeys(("draft_length", "draft_experts"))
    base = sm.PRESETS[preset](model().config).replace(prefill_chunk=8, deterministic_sampling=True, devices=devices)
    return base.replace(draft=draft.split()[0], **none | PRESETS[preset] | DRAFTED[draft])


def refusal(plan: sm.Plan) -> str | None:
    """What is said of a plan that does not go together."""
    try:
        plan.validate(model().config)
    except sm.PlanError as e:
        return str(e)
    return None


def cases() -> dict[str, tuple[str, str]]:
    """Preset and draft of every plan that is taken; of presets that differ by their names alone with this draft, the first."""
    plans = {}
    for preset in sm.PRESETS:
        for draft in DRAFTED:
            plan = plan_of(preset, draft, 1)
            if refusal(plan) is None:
                plans.setdefault(plan.replace(preset="resident"), (preset, draft))
    return {f"{draft}, {preset}": (preset, draft) for preset, draft in plans.values()}


@functools.cache
def tokens(preset: str = "resident", draft: str = "none", devices: int = 1) -> list[tuple[int, ...]]:
    engine = sm.Engine(model(), plan_of(preset, draft, devices), **given(draft))
    done = tokens_of(engine.generate(PROMPTS, PARAMS))
    assert engine.stats()["compilations_after_warmup"] == 0, (preset, draft)
    return done


def given(draft: str) -> dict:
    if draft == "mtp hot":
        return {"mtp_head": mtp.random_head(model(), experts_on_host=True)}
    if draft == "model":
        return {"draft_model": model()}
    if draft == "custom":  # right tokens, but for the last of some
        texts = dict(zip(PROMPTS, tokens(), strict=True))
        return {"draft": ScriptedDraft(2, texts, lambda row, start: 1 + start % 2)}
    return DRAFTS.executor(draft.split()[0]).random_inputs(model())


def main() -> None:
    devices = int(sys.argv[1])
    print(json.dumps({"expected": tokens(), "found": {name: tokens(*case, devices) for name, case in cases().items()}}))


if __name__ == "__main__":
    main()
