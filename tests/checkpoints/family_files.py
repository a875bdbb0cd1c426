"""Checkpoints of the tiny random models of every family, in any of its layouts."""

import json

import numpy as np
import safetensors.numpy

from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.spec import random_tensor, spec_leaves


def stored_tensors(model, layout: int) -> dict[str, np.ndarray]:
    """Every tensor of `tiny_family`, experts in the family's given layout, read back out of the model's blocks."""
    config, family = model.config, family_of(model.config)
    tensors = {spec.name: random_tensor(spec, 0) for spec in spec_leaves(family.weight_specs(config))}
    for moe, layer in enumerate(config.expert_layers):
        for expert in range(config.num_experts):
            for part in family.expert_layouts(config, layer, expert)[layout]:
                values = part.view(np.asarray(model.experts[moe][expert]))
                target = tensors.setdefault(part.name, np.zeros(part.spec.shape, np.float32))
                target = target if part.index is None else target[part.index]
                target[...] = values.reshape(target.shape)
    return tensors


def write(path, raw: dict, tensors: dict[str, np.ndarray]):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path / "model.safetensors")
    return path
