"""Writes the golden logits of every family from transformers in float32; needs the [parity] extra.

    python tests/golden/families/regenerate.py [FAMILY ...]

nllb_moe needs transformers 4 (written with 4.57.1): release 5.23 sends every token to experts 0 and 1.
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

from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import random_tensor, spec_leaves
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS, WITH_TOWERS

FOLDER = pathlib.Path(__file__).parent
ALL = RAW_CONFIGS | WITH_TOWERS | ENCODER_DECODERS
SHAPES = ((1, 9), (2, 17))  # [B, T], the second longer than every window and chunk


def write_checkpoint(name: str, path: pathlib.Path) -> None:
    """`tiny_family(name)` as a Hugging Face directory."""
    raw = ALL[name]
    config = parse_config(raw)
    family = family_of(config)
    specs = spec_leaves(family.weight_specs(config))
    for layer in config.expert_layers:
        for expert in range(config.num_experts):
            specs += [part.spec for part in family.expert_layouts(config, layer, expert)[0]]
    tensors = {_published(name, spec.name): random_tensor(spec, 0) for spec in specs}
    (path / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _published(family: str, name: str) -> str:
    """The name that the reference knows a tensor by, where its text part is one of two."""
    return name.replace("model.", "model.language_model.", 1) if family in WITH_TOWERS else name


def golden(name: str) -> dict[str, np.ndarray]:
    """prompt0.. and logits0.."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(name, pathlib.Path(folder))
        kind = transformers.AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else transformers.AutoModelForCausalLM
        kind = transformers.AutoModelForImageTextToText if name in WITH_TOWERS else kind
        load = kind.from_pretrained
        model, loaded = load(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    # Left at random: a tower, and an indexer that keeps every position.
    others = [key for keys in loaded.values() for key in map(str, keys)]
    if any(not key.startswith("model.visual.") and ".indexer." not in key for key in others):
        raise SystemExit(f"error: {name}: transformers did not take every tensor: {loaded}")
    if name in ENCODER_DECODERS:
        return translated(model)
    rng, arrays = np.random.default_rng(0), {}
    for i, shape in enumerate(SHAPES):
        arrays[f"prompt{i}"] = rng.integers(0, model.config.get_text_config().vocab_size, shape).astype(np.int32)
        with torch.no_grad():
            token_ids = torch.from_numpy(arrays[f"prompt{i}"].astype(np.int64))
            arrays[f"logits{i}"] = model.eval()(token_ids, use_cache=False).logits.numpy()
    return arrays


def translated(model) -> dict[str, np.ndarray]:
    """prompt0, logits0 and the ragged source that they follow."""
    if transformers.__version__ >= "5":
        raise SystemExit("error: an encoder-decoder with experts needs transformers 4, see above")
    rng = np.random.default_rng(0)
    source, prompt = (rng.integers(3, model.config.vocab_size, (3, length)) for length in (11, 8))
    lengths = np.array([11, 1, 6])
    mask = np.arange(11) < lengths[:, None]
    inputs = (torch.from_numpy(a) for a in (np.where(mask, source, model.config.pad_token_id), mask.astype(np.int64), prompt))
    with torch.no_grad():
        logits = model.eval()(**dict(zip(("input_ids", "attention_mask", "decoder_input_ids"), inputs, strict=True))).logits
    return {"prompt0": prompt, "source": source, "lengths": lengths, "logits0": logits.numpy()}


def main() -> None:
    for name in sys.argv[1:] or ALL:
        target = FOLDER / f"{name}.npz"
        temporary = target.with_suffix(".partial.npz")
        np.savez_compressed(temporary, **golden(name))
        os.replace(temporary, target)
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
