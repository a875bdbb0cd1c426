"""Writes the hidden states of chosen layers for many texts: what the training of a draft head or a probe reads.

Example:
    specmoe features --model=DIR --texts=texts.jsonl --layers=0,12,24 --output=FEATURES
The same command goes on after an interruption.
"""

from absl import flags

from specmoe_jax.checkpoints import load_model
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import plan_flags
from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs import features
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.progress import PROGRESS

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_ADAPTER = flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter (PEFT), merged into the model as it is loaded.")
_TEXTS = flags.DEFINE_string("texts", None, "Texts in any form that generate takes as --prompts.", required=True)
_COLUMN = flags.DEFINE_string("prompt_column", None, "The column of a table that holds the texts. Default: prompt.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder of the shards.", required=True)
_LAYERS = flags.DEFINE_list("layers", None, "0: embeddings, i: after the i-th layer. Default: the last, after the final norm.")
_FORM = flags.DEFINE_enum("form", "safetensors", [*features.FORMS], "Of the shards.")
_STORE_DTYPE = flags.DEFINE_enum("store_dtype", None, [*features.DTYPES], "Of the stored states. Default: the computed type.")
_TEXTS_PER_SHARD = flags.DEFINE_integer("texts_per_shard", 64, "Read together and written together.", lower_bound=1)
_PRESET = flags.DEFINE_enum("preset", "streaming", [*PRESETS], "The plan; streaming: a layer crosses the link once a shard.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32.")
_PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
flags.adopt_module_key_flags(plan_flags)


def main() -> None:
    prompts = read_prompts(_TEXTS.value, SamplingParams(), column=_COLUMN.value)
    if any(prompt.conversation for prompt in prompts):
        raise RequestError(f"{_TEXTS.value} holds conversations; give texts, or token ids that a chat template has made")
    layers = None if _LAYERS.value is None else _numbers(_LAYERS.value)
    common.use_compile_cache()
    tier = plan_flags.value("expert_tier") or "host"
    model = load_model(_MODEL.value, dtype=_DTYPE.value, expert_tier=tier, adapter=_ADAPTER.value, progress=_PROGRESS.value)
    dtype = {} if _DTYPE.value is None else {"dtype": _DTYPE.value}
    engine = Engine(model, plan_flags.over(preset(_PRESET.value, model.config), **dtype))
    how = {"form": _FORM.value, "dtype": _STORE_DTYPE.value, "texts_per_shard": _TEXTS_PER_SHARD.value}
    texts = [prompt.model_input for prompt in prompts]
    features.write_features(engine, texts, _OUTPUT.value, layers=layers, progress=_PROGRESS.value, **how)


def _numbers(values: list[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError as e:
        raise RequestError(f"--layers is {','.join(values)!r}; give whole numbers, separated by commas") from e
