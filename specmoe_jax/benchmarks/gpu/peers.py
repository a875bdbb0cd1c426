"""transformers with accelerate's CPU offload beside our presets: the same weights, prompts and accelerator budget."""

import importlib.util
import os
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from specmoe_jax.benchmarks.gpu import presets, record, shapes
from specmoe_jax.benchmarks.gpu.presets import Case
from specmoe_jax.models.families import mixtral
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.support.units import GIB

FULL = {"config": shapes.mixtral_8x7b(4), "budget": 8 * GIB, "batches": (64, 1), "load": presets.Load(128, 8, 6), "quick": False}
SMALL = {
    "config": shapes.small(shapes.mixtral_8x7b(2)),
    "budget": GIB,
    "batches": (2, 1),
    "load": presets.Load(8, 16, 0),
    "quick": True,
}
NEEDED = ("torch", "transformers", "accelerate")


def rows(folder: pathlib.Path, sizes: dict) -> Iterator[dict]:
    """Ours first, then theirs; what is not installed is said and not measured."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both libraries share the device
    record.say("peers: makes the weights")
    model, link, load = shapes.random_on_device(sizes["config"]), presets.link_rate(sizes["quick"]), sizes["load"]
    for batch, names in zip(sizes["batches"], (("streaming", "specmoeoff"), ("on_demand",)), strict=True):
        for name in names:
            case = Case(name, batch, budget_bytes=sizes["budget"])
            yield from record.asked(f"peers: {case.name}", lambda case=case: presets.rows(case, model, load, link, folder))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield {"question": "peer", "skipped": f"{', '.join(missing)}: not installed"}
        return
    yield from record.asked("peers: transformers", lambda: theirs(model, sizes))


def theirs(model: Model, sizes: dict) -> Iterator[dict]:
    """transformers on the same weights, the smaller batch first."""
    start_s = time.perf_counter()
    peer = offloaded(model, sizes["budget"])
    record.say(f"peers: transformers is ready after {time.perf_counter() - start_s:.1f} s")
    for batch in sizes["batches"][::-1]:
        yield from record.asked(f"peers: transformers, batch {batch}", lambda batch=batch: iter([generate(peer, batch, sizes)]))


def generate(peer, batch: int, sizes: dict) -> dict:
    """Greedy tokens per second after the first token of a run of its own; the accelerator's peak as torch tells it."""
    import torch
    import transformers

    cuda, load = torch.cuda.is_available(), sizes["load"]
    ids = np.random.default_rng(0).integers(0, peer.config.vocab_size, (batch, load.prompt))
    ids = torch.tensor(ids, device="cuda" if cuda else "cpu")
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def timed(new: int) -> float:
        start_s = time.perf_counter()
        with torch.no_grad():
            peer.generate(ids, max_new_tokens=new, **fixed)
        return time.perf_counter() - start_s

    timed(1)
    first_s, all_s = timed(1), timed(load.new)
    return {
        "question": "peer",
        "peer": f"transformers {transformers.__version__}",
        "batch": batch,
        "budget_bytes": sizes["budget"],
        "decode_tokens_per_s": batch * (load.new - 1) / (all_s - first_s),
        "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def offloaded(model: Model, budget: int):
    """The model as transformers has it, in memory; beyond the budget accelerate leaves its layers to the host and copies them."""
    import accelerate
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**mixtral.config_json(model.config, "bfloat16"))
    with accelerate.init_empty_weights(include_buffers=False):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = plain_tensors(model)
    state = {}
    for name, parameter in peer.named_parameters():
        own = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        state[name] = tensors[own] if own in tensors else expert_tensor(model, name)
        if state[name].shape != parameter.shape:
            raise ValueError(f"{name}: {tuple(state[name].shape)} here, {tuple(parameter.shape)} in transformers")
    peer.load_state_dict(state, strict=True, assign=True)
    peer.eval()
    if not torch.cuda.is_available():
        return peer
    whole = ["MixtralDecoderLayer"]
    placed = accelerate.infer_auto_device_map(peer, max_memory={0: budget, "cpu": 1000 * GIB}, no_split_module_classes=whole)
    return accelerate.dispatch_model(peer, placed)


def plain_tensors(model: Model) -> dict:
    """Everything but the experts, by checkpoint name."""
    specs = spec_leaves(family_of(model.config).weight_specs(model.config))
    return {spec.name: _tensor(np.array(array)) for spec, array in zip(specs, jax.tree.leaves(model.weights), strict=True)}


def expert_tensor(model: Model, name: str):
    """A layer's experts as transformers stacks them: model.layers.N.mlp.experts.gate_up_proj [E, 2F, M], down_proj [E, M, F]."""
    import torch

    config = model.config
    blocks = model.experts[config.moe_layers.index(int(name.split(".")[2]))]
    E, F, M = config.num_experts, config.expert_hidden, config.hidden_size
    down = name.endswith("down_proj")
    out = torch.empty((E, M, F) if down else (E, 2 * F, M), dtype=torch.bfloat16)
    for expert, block in enumerate(blocks):
        values = _tensor(np.asarray(block))
        out[expert].copy_(values[2].T if down else values[:2].reshape(2 * F, M))
    return out


def _tensor(values: np.ndarray):
    """bfloat16, or uint16 that holds its bits, without a copy."""
    import torch

    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
