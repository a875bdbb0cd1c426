"""transformers with accelerate's CPU offload beside our presets: the same weights, prompts and accelerator budget."""

import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from specmoe_jax.benchmarks.gpu import presets, shapes
from specmoe_jax.benchmarks.specmoeoff import MIXTRAL_SHAPED
from specmoe_jax.checkpoints.conversion.write import Output, write_index, write_safetensors
from specmoe_jax.models.families import mixtral
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.support.units import GIB

FULL = {"config": shapes.mixtral_8x7b(8), "budget": 8 * GIB, "load": presets.Load((16, 1), 512, 32, 40), "quick": False}
SMALL = {"config": MIXTRAL_SHAPED, "budget": GIB, "load": presets.Load((2, 1), 8, 4, 5), "quick": True}


def rows(folder: pathlib.Path, sizes: dict) -> Iterator[dict]:
    """Ours first, then theirs; what is not installed is said and not measured."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both libraries share the device
    link, load = presets.link_rate(sizes["quick"]), sizes["load"]
    model, small = shapes.random_on_device(sizes["config"]), folder / "assistant"
    for name in ("on_demand", "streaming", "specmoe"):
        for row in presets.rows(name, model, load, link, folder, budget_bytes=sizes["budget"]):
            yield row | {"budget_bytes": sizes["budget"]}
    needed = ("torch", "transformers") if jax.devices()[0].platform == "cpu" else ("torch", "transformers", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        yield {
            "question": "peer",
            "skipped": f"{', '.join(missing)}: not installed; pip install them and run --parts=peers --again",
        }
        return
    write_checkpoint(folder / "weights", model)
    write_checkpoint(small, shapes.random_on_device(dataclasses.replace(sizes["config"], num_layers=1)))
    del model
    gc.collect()
    for batch in load.batches:
        yield generate(folder / "weights", None, batch, load, sizes["budget"])
    yield generate(folder / "weights", small, 1, load, sizes["budget"])  # assisted generation takes one request


def generate(folder: pathlib.Path, assistant: pathlib.Path | None, batch: int, load: presets.Load, budget: int) -> dict:
    """Greedy tokens per second after the first token of a run of its own; the accelerator's peak as torch tells it."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    limits = {"device_map": "auto", "max_memory": {0: budget, "cpu": "1000GiB"}} if cuda else {}

    def read(path: pathlib.Path, **options) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)

    model = read(folder, **limits)
    helper = {} if assistant is None else {"assistant_model": read(assistant).to("cuda" if cuda else "cpu")}
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, load.prompt))
    ids = torch.tensor(ids, device="cuda" if cuda else "cpu")
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def timed(new: int) -> float:
        start_s = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=new, **fixed, **helper)
        return time.perf_counter() - start_s

    timed(1)
    first_s, all_s = timed(1), timed(load.new)
    return {
        "question": "peer",
        "peer": f"transformers {transformers.__version__}" + (", assistant of one layer" if assistant else ""),
        "batch": batch,
        "budget_bytes": budget,
        "decode_tokens_per_s": batch * (load.new - 1) / (all_s - first_s),
        "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def write_checkpoint(folder: pathlib.Path, model: Model) -> None:
    """A bfloat16 model in Hugging Face names, one file a layer's experts and one for everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    family, config = family_of(model.config), model.config
    specs = spec_leaves(family.weight_specs(config))
    files = {"rest": [_output(spec, array) for spec, array in zip(specs, jax.tree.leaves(model.weights), strict=True)]}
    for layer, blocks in zip(config.moe_layers, model.experts, strict=True):
        files[f"layer{layer}"] = [
            _output(spec, block, part)
            for expert, block in enumerate(blocks)
            for part, spec in enumerate(family.expert_specs(config, layer, expert))
        ]
    for name, outputs in files.items():
        write_safetensors(folder / f"{name}.safetensors", outputs, {"format": "pt"})
    owners = {output.name: f"{name}.safetensors" for name, outputs in files.items() for output in outputs}
    write_index(folder, owners, sum(output.bytes for outputs in files.values() for output in outputs))
    (folder / "config.json").write_text(json.dumps(mixtral.config_json(config, "bfloat16"), indent=2), encoding="utf-8")


def _output(spec, array: jax.Array, part: int | None = None) -> Output:
    """part: of an expert's block, 2 being the transposed one; None for an array of the weights."""

    def read() -> np.ndarray:
        values = np.asarray(array)
        if part is None:
            return values
        values = values[part].view(ml_dtypes.bfloat16)
        return values.T if part == 2 else values

    return Output(spec.name, np.dtype(ml_dtypes.bfloat16), spec.shape, read)
