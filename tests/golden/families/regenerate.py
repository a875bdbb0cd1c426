"""Writes the golden logits of every family from transformers in float32; needs the [parity] extra.

    python tests/golden/families/regenerate.py [FAMILY ...]

The models are those of specmoe_jax.testing_families: their weights come from a seed and are nowhere stored.
"""

import json
import os
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from specmoe_jax.models.families import family_of, parse_config
from specmoe_jax.models.spec import random_tensor, spec_leaves
from specmoe_jax.testing_families import RAW_CONFIGS

FOLDER = pathlib.Path(__file__).parent
SHAPES = ((1, 9), (2, 17))  # [B, T], the second longer than every window and chunk


def write_checkpoint(name: str, path: pathlib.Path) -> None:
    """`tiny_family(name)` as a Hugging Face directory."""
    config = parse_config(RAW_CONFIGS[name])
    family = family_of(config)
    specs = spec_leaves(family.weight_specs(config))
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            specs += [part.spec for part in family.expert_layouts(config, layer, expert)[0]]
    tensors = {spec.name: random_tensor(spec, 0) for spec in specs}
    (path / "config.json").write_text(json.dumps(RAW_CONFIGS[name]))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def golden(name: str) -> dict[str, np.ndarray]:
    """prompt0.. and logits0.."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(name, pathlib.Path(folder))
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, loaded = load(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    if any(loaded.values()):
        raise SystemExit(f"error: {name}: transformers did not take every tensor: {loaded}")
    rng, arrays = np.random.default_rng(0), {}
    for i, shape in enumerate(SHAPES):
        arrays[f"prompt{i}"] = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        with torch.no_grad():
            token_ids = torch.from_numpy(arrays[f"prompt{i}"].astype(np.int64))
            arrays[f"logits{i}"] = model.eval()(token_ids, use_cache=False).logits.numpy()
    return arrays


def main() -> None:
    for name in sys.argv[1:] or RAW_CONFIGS:
        target = FOLDER / f"{name}.npz"
        temporary = target.with_suffix(".partial.npz")
        np.savez_compressed(temporary, **golden(name))
        os.replace(temporary, target)
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
