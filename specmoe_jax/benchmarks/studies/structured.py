"""Answers to random JSON schemas: how many are valid, and whether speculation changes a token.

    python -m specmoe_jax.benchmarks.studies.structured --cases=1000 --presets=resident,specmoe

Nested and recursive schemas, enums, numbers, Unicode (specmoe_jax.testing.schemas), one request each, drawn at temperature 1 with
noise that belongs to the positions. An answer that --max_new_tokens cut is no valid one and no invalid one: it is counted apart.
"""

import dataclasses
import json
import time

import jsonschema
from absl import app, flags

from specmoe_jax.checkpoints import load_model
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.models.model import random_model
from specmoe_jax.testing import TINY, byte_tokenizer
from specmoe_jax.testing.schemas import random_schema

_MODEL = flags.DEFINE_string("model", "tiny", "A checkpoint, or the random model of the tests.")
_CASES = flags.DEFINE_integer("cases", 1000, "Schemas.", lower_bound=1)
_PRESETS = flags.DEFINE_list("presets", ["resident", "specmoe"], "Compared with each other, the first without speculation.")
_ROWS = flags.DEFINE_integer("rows", 32, "Of a batch.", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Of an answer.", lower_bound=1)


def main(argv: list[str]) -> None:
    window = _MAX_NEW_TOKENS.value + 16
    if _MODEL.value == "tiny":
        config = dataclasses.replace(TINY, max_positions=window)
        model = random_model(config, seed=0, dtype="float32", tokenizer=byte_tokenizer())
    else:
        model = load_model(_MODEL.value)
    schemas, first = [random_schema(seed) for seed in range(_CASES.value)], None
    asked = [
        SamplingParams(max_new_tokens=_MAX_NEW_TOKENS.value, temperature=1.0, seed=seed, json_schema=schema)
        for seed, schema in enumerate(schemas)
    ]
    for name in _PRESETS.value:
        plan = preset(name, model.config).replace(batch_size=_ROWS.value, deterministic_sampling=True)
        engine, start_s = Engine(model, plan, progress="log"), time.perf_counter()
        done = engine.generate(["As JSON: "] * len(asked), asked)
        figures = judged(schemas, done) | {"seconds": round(time.perf_counter() - start_s, 1)}
        figures |= {"tokens_per_step": engine.stats()["tokens_per_step"]}
        if first is None:
            first = done
        else:
            figures["same_as_first"] = sum(a.token_ids == b.token_ids for a, b in zip(first, done, strict=True))
        print(json.dumps({"preset": name, "cases": len(asked)} | figures), flush=True)


def judged(schemas: list[dict], completions: list[Completion]) -> dict[str, int]:
    """valid and invalid: of the answers that ended. length: that were cut."""
    figures = {"valid": 0, "invalid": 0, "length": 0, "error": 0}
    for schema, completion in zip(schemas, completions, strict=True):
        if completion.finish_reason == "stop":
            figures["valid" if is_valid(schema, completion.text) else "invalid"] += 1
        else:
            figures[completion.finish_reason] += 1
    return figures


def is_valid(schema: dict, text: str) -> bool:
    """By another library."""
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    app.run(main)
