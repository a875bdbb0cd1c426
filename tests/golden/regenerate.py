"""Writes the golden files from transformers' own models in float32; needs the [parity] extra.

    python tests/golden/regenerate.py            all of them
    python tests/golden/regenerate.py demo       after the bundled model has changed

The odd models come from the seed of `random_model`, so their weights are nowhere stored.
"""

import json
import os
import pathlib
import sys
import tempfile

import golden_models
import numpy as np
import safetensors.numpy
import torch
import transformers

from specmoe_jax.checkpoints import checkpoint_hash, checkpoint_path, load_model
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.spec import random_tensor, spec_leaves


def reference(path: pathlib.Path) -> torch.nn.Module:
    """transformers' model of a directory, float32, plain attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model, token_ids: np.ndarray) -> np.ndarray:
    """[B, T] -> [B, T, V] float32."""
    with torch.no_grad():
        return model(torch.from_numpy(token_ids.astype(np.int64)), use_cache=False).logits.numpy()


def module_outputs(model, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Embedding, and of each layer the attention's and the experts' output (before the residual) and the routing."""
    kept = {}

    def keep(name, pick):
        def hook(module, arguments, output):
            for suffix, value in pick(output).items():
                kept[name + suffix] = value.numpy()

        return hook

    hooks = [model.model.embed_tokens.register_forward_hook(keep("embed", lambda out: {"": out}))]
    for i, layer in enumerate(model.model.layers):
        routing = keep(f"layer{i}.", lambda out: {"router_weights": out[1], "router_ids": out[2]})
        hooks.append(layer.self_attn.register_forward_hook(keep(f"layer{i}.attention", lambda out: {"": out[0]})))
        hooks.append(layer.mlp.gate.register_forward_hook(routing))
        hooks.append(layer.mlp.register_forward_hook(keep(f"layer{i}.moe", lambda out: {"": out})))
    logits(model, token_ids)
    for hook in hooks:
        hook.remove()
    return kept


def write_random_checkpoint(name: str, path: pathlib.Path) -> None:
    """The weights of random_model(odd_config(name), seed=SEED) as a Hugging Face directory."""
    config = golden_models.odd_config(name)
    family = family_of(config)
    specs = spec_leaves(family.weight_specs(config))
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            specs += family.expert_specs(config, layer, expert)
    tensors = {spec.name: random_tensor(spec, golden_models.SEED) for spec in specs}
    (path / "config.json").write_text(json.dumps(golden_models.RAW_CONFIGS[name]))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def random_golden(name: str) -> dict[str, np.ndarray]:
    """prompt0.., logits0.. and the module outputs of the last prompt."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(name, pathlib.Path(folder))
        model = reference(pathlib.Path(folder))
    prompts = golden_models.random_prompts(model.config.vocab_size)
    arrays = {f"prompt{i}": prompt for i, prompt in enumerate(prompts)}
    arrays |= {f"logits{i}": logits(model, prompt) for i, prompt in enumerate(prompts)}
    return arrays | module_outputs(model, prompts[-1])


def demo_golden() -> dict[str, np.ndarray]:
    """prompt0.., their first logits0.. and argmax0.., and the hash of the checkpoint that they belong to."""
    path = checkpoint_path("demo")
    model, tokenizer = reference(path), load_model("demo").tokenizer
    arrays = {"checkpoint_hash": np.array(checkpoint_hash(path))}
    for i, text in enumerate(golden_models.DEMO_TEXTS):
        prompt = np.array([tokenizer.encode(text)], np.int32)
        values = logits(model, prompt)
        arrays |= {
            f"prompt{i}": prompt,
            f"logits{i}": values[:, : golden_models.DEMO_FULL_POSITIONS],
            f"argmax{i}": values.argmax(-1).astype(np.int32),
        }
    return arrays


def write(name: str) -> None:
    """One golden file, replaced whole."""
    arrays = demo_golden() if name == "demo" else random_golden(name)
    target = golden_models.golden_file(name)
    temporary = target.with_suffix(".partial.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, target)
    print(f"{target.name}: {target.stat().st_size} bytes, {len(arrays)} arrays")


def main() -> None:
    names = sys.argv[1:] or [*golden_models.RAW_CONFIGS, "demo"]
    unknown = set(names) - {*golden_models.RAW_CONFIGS, "demo"}
    if unknown:
        raise SystemExit(f"error: no golden model {', '.join(sorted(unknown))}; there are odd, windowed, demo")
    for name in names:
        write(name)


if __name__ == "__main__":
    main()
