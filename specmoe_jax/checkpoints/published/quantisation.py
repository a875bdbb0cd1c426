"""The one reader of how a checkpoint is quantised: quantization_config, hf_quant_config.json, or the headers where both lack it."""

import fnmatch
import math
import pathlib
import re
from collections.abc import Collection
from typing import NamedTuple

from specmoe_jax.checkpoints.files import BLOCK_PREFIX, OWN_METHOD, Checkpoint, read_json
from specmoe_jax.config.model_config import LAYERS, ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.packing import kind_of, packed_bytes
from specmoe_jax.models.packing.kinds.int4_groups import with_scale_type
from specmoe_jax.models.packing.matrices import MatrixKind
from specmoe_jax.models.packing.parts import matrix_kind, separate_parts
from specmoe_jax.models.published.config_json import show
from specmoe_jax.models.spec import TensorSpec, spec_leaves
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.units import GIB

MODELOPT_FILE = "hf_quant_config.json"
TYPE_BYTES = {"float32": 4, "float": 4, "float64": 8}  # of what is not quantised; everything else is stored in two bytes
NEVER = ("embed_tokens", "shared", "lm_head", "router", "gate", "classifier", "shared_expert_gate")  # which formats leave alone


class Quantisation(NamedTuple):
    """words: what it is called. bits: a weight takes on disk, scales included; None where the config does not say.

    source: the file that tells. packing: how experts of this form stay packed (models/packing); None where this version does not
    load it. skipped: patterns of modules that are not quantised.
    """

    words: str
    bits: float | None
    source: str
    packing: str | None = None
    skipped: tuple[str, ...] = ()


def read_quantisation(path: pathlib.Path, checkpoint: Checkpoint | None = None) -> Quantisation | None:
    """How the weights of a directory are quantised; None where they are not. checkpoint: its headers, where there are any."""
    raw = read_json(path / "config.json")
    if told := from_config(raw):
        return told
    if (path / MODELOPT_FILE).exists():
        inner = read_json(path / MODELOPT_FILE).get("quantization")
        if isinstance(inner, dict) and inner.get("quant_algo"):
            return _modelopt(inner, MODELOPT_FILE)
    return None if checkpoint is None else from_headers(checkpoint)


def from_config(raw: dict) -> Quantisation | None:
    """What a config.json says, of itself or of its text part."""
    text = _object(raw, "text_config")
    keys = ("quantization_config", "compression_config")
    found = next((holder[key] for holder in (raw, text) for key in keys if holder.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: quantization_config is {show(found)}; it must be an object")
    read = _METHODS.get(str(found.get("quant_method", "modelopt" if found.get("quant_algo") else "")).lower())
    if read is None:
        return Quantisation(f"quant_method {show(found.get('quant_method'))}", None, "config.json")
    told = read(found, "config.json")
    if told.packing is None or _kind(told.packing).stacked or named_type(raw) not in ("bfloat16", "torch.bfloat16"):
        return told
    return told._replace(packing=with_scale_type(told.packing, matrix_kind(told.packing), "BF16"))


def named_type(raw: dict) -> str:
    """Of the weights that are not quantised, by a config.json."""
    text = _object(raw, "text_config")
    return str(raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"))


def from_headers(checkpoint: Checkpoint) -> Quantisation | None:
    """What the names and types of the tensors say, where no config does."""
    ends = {name.rpartition(".")[2] for name in checkpoint.tensors} | {name.rpartition("_")[2] for name in checkpoint.tensors}
    types = {tensor.entry.dtype for tensor in checkpoint.tensors.values()}
    source = checkpoint.files[0].name
    if "blocks" in ends and "scales" in ends and "U8" in types:
        return _mxfp4({}, source)
    if "inv" in ends and "F8_E4M3" in types:
        return _fp8({}, source)
    for marks, words, bits in _MARKS:
        if marks <= ends | types:
            return Quantisation(words, bits, source, packing="nvfp4" if words == "NVFP4" else None)
    return None


def check_quantisation(path: pathlib.Path, config: ModelConfig, checkpoint: Checkpoint | None = None) -> None:
    """Raises CheckpointError, which names form and size on disk, unless the weights are plain or of a form that is built."""
    found = read_quantisation(path, checkpoint)
    if found is None or is_built(found, config):
        return
    size = stored_bytes(path, config, found) if checkpoint is None else checkpoint.bytes
    bits = "" if found.bits is None else f", {found.bits:.3g} bits a weight"
    on_disk = "" if size is None else f", {size / GIB:.3g} GiB on disk"
    raise CheckpointError(
        f"{found.source}: the weights are quantised as {found.words}{bits}{on_disk}; this version does not load them: take the "
        "model's repository without quantisation, or dequantise it with transformers and save_pretrained"
    )


def stored_bytes(path: pathlib.Path, config: ModelConfig, quantisation: Quantisation | None) -> int | None:
    """What the weights take on disk by config.json alone; None where it leaves open how many bits a quantised weight takes."""
    raw = read_json(path / "config.json")
    plain = TYPE_BYTES.get(named_type(raw).removeprefix("torch."), 2)
    bits = None if quantisation is None else quantisation.bits
    built = quantisation is not None and is_built(quantisation, config)
    if quantisation is not None and bits is None and not built:
        return None
    total, quantised = 0.0, plain if bits is None else bits / 8
    specs = spec_leaves(family_of(config).weight_specs(config))
    for spec in specs:
        packed = quantisation is not None and _is_quantised(spec, quantisation.skipped)
        total += spec.size * (quantised if packed else plain)
    if built:
        assert quantisation is not None
        packed = config.with_packing(quantisation.packing)
        return int(total) + config.num_experts * sum(map(packed_bytes, packed.layer_experts))
    for layer in config.expert_layers:
        parts = family_of(config).expert_layouts(config, layer, 0)[0]
        for part in parts:
            share = config.num_experts if part.index is None else 1
            packed = quantisation is not None and _is_quantised(part.spec, quantisation.skipped, expert=part.index is not None)
            total += share * part.spec.size * (quantised if packed else plain)
    return int(total)


def _object(raw: dict, key: str) -> dict:
    """What stands under a key, where it is an object; else an empty one."""
    found = raw.get(key)
    return found if isinstance(found, dict) else {}


def _is_quantised(spec: TensorSpec, skipped: Collection[str], *, expert: bool = False) -> bool:
    """Matrices of linear layers, unless a pattern names them: a part of the name, a glob, or re: and an expression."""
    module = spec.name.removesuffix(".weight")
    if len(spec.shape) < (3 if expert else 2) or module.rpartition(".")[2] in NEVER or module.endswith("bias"):
        return False
    for pattern in skipped:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return False
        elif "*" in pattern:
            if fnmatch.fnmatch(module, f"{pattern}*"):
                return False
        elif module == pattern or module.startswith(f"{pattern}.") or f".{pattern}." in f".{module}.":
            return False
    return True


def is_built(quantisation: Quantisation, config: ModelConfig) -> bool:
    """Whether weights of this form of this family are loaded, their experts packed as they are."""
    if quantisation.packing is None:
        return False
    packed = config.with_packing(quantisation.packing)
    if any(matrix_kind(str(experts.packing)).expert_problem(experts) for experts in packed.layer_experts):
        return False
    family, kind, experts = family_of(config), _kind(quantisation.packing), packed.experts
    if kind.stacked or kind.converted:
        return True
    if kind.fused or hasattr(family, "packed_parts"):
        return kind.fused and hasattr(family, "packed_parts")
    return separate_parts(experts, family.expert_layouts(config, config.expert_layers[0], 0)[0]) is not None


def as_stored(path: pathlib.Path, config: ModelConfig, checkpoint: Checkpoint | None = None) -> ModelConfig:
    """The config with its experts packed as the checkpoint holds them. checkpoint: its headers, where there are any."""
    found = read_quantisation(path, checkpoint)
    packing = found.packing if found is not None and is_built(found, config) else None
    if packing is not None and checkpoint is not None and not _kind(packing).stacked:
        packing = _in_headers(packing, checkpoint)
    return config.with_packing(packing)


def _in_headers(packing: str, checkpoint: Checkpoint) -> str | None:
    """The packing with the type of its scales; None where experts are among the modules that were left as they are."""
    if any(name.startswith(BLOCK_PREFIX) for name in checkpoint.tensors):
        return packing
    kind = matrix_kind(packing)
    marked = next((t for name, t in checkpoint.tensors.items() if name.endswith(kind.mark) and ".experts." in name), None)
    return None if marked is None else with_scale_type(packing, kind, marked.entry.dtype)


def _kind(packing: str) -> MatrixKind:
    """The kind of all layers, which may differ in its parameters."""
    return matrix_kind(packing.partition(LAYERS)[0])


def _fp8(raw: dict, source: str) -> Quantisation:
    block = raw.get("weight_block_size", [128, 128] if not raw else None)
    if raw.get("quant_algo") == "MIXED_PRECISION":
        return Quantisation(f"FP8 with experts as {raw.get('moe_quant_algo')}", None, source, skipped=_patterns(raw))
    if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        packing = f"fp8:{block[0]}x{block[1]}"
        words, bits = f"FP8 in blocks of {block[0]} x {block[1]}", 8 + 32 / math.prod(block)
        return Quantisation(words, bits, source, packing=packing, skipped=_patterns(raw))
    return Quantisation("FP8", 8.0, source, packing="fp8_rows:tensor", skipped=_patterns(raw))


def _mxfp4(raw: dict, source: str) -> Quantisation:
    return Quantisation("MXFP4", 4.25, source, packing="mxfp4", skipped=_patterns(raw) or ("self_attn", "router"))


def _gptq(raw: dict, source: str) -> Quantisation:
    """Groups with a half-precision scale and a zero point; rows out of order where desc_act."""
    found = _groups("GPTQ", raw.get("bits"), raw.get("group_size"), source, beside=16, zeros=True, raw=raw)
    if raw.get("desc_act"):
        return found._replace(words=f"{found.words} with desc_act")
    version = ":v2" if raw.get("checkpoint_format") == "gptq_v2" else ""
    return found._replace(packing=_grouped("gptq", raw.get("bits"), raw.get("group_size"), version))


def _own(raw: dict, source: str) -> Quantisation:
    """A conversion whose experts stayed packed; the rest of it is not."""
    packing = str(raw.get("packing"))
    for name in set(packing.split(LAYERS)):
        kind_of(name)  # raises for one that this version does not know
    words = ", ".join(dict.fromkeys(packing.split(LAYERS)))
    return Quantisation(f"experts packed as {words}", None, source, packing=packing, skipped=("re:.*",))


def _awq(raw: dict, source: str) -> Quantisation:
    bits, group = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    found = _groups("AWQ", bits, group, source, beside=16, zeros=True, raw=raw)
    usual = str(raw.get("version", "gemm")).lower() == "gemm" and raw.get("zero_point", True)
    return found._replace(packing=_grouped("awq", bits, group)) if usual else found


def _compressed(raw: dict, source: str) -> Quantisation:
    """compressed-tensors: the weights of the first group of layers, and how they are laid out."""
    groups = _object(raw, "config_groups")
    weights = next((g["weights"] for g in groups.values() if isinstance(g, dict) and isinstance(g.get("weights"), dict)), {})
    layout = str(raw.get("format"))
    scale = 8 if "fp4" in layout else 16  # bits of a group's scale
    kind = "FLOAT" if weights.get("type") == "float" else "INT"
    words = f"compressed-tensors {layout}"
    bits, group = weights.get("num_bits"), weights.get("group_size")
    found = _groups(words, bits, group, source, beside=scale, raw=raw, kind=kind)
    zeros = "" if weights.get("symmetric", True) else ":zeros"
    if len(groups) == 1 and layout == "pack-quantized" and kind == "INT":
        return found._replace(packing=_grouped("compressed", bits, group, zeros))
    if len(groups) == 1 and layout == "float-quantized" and bits == 8 and weights.get("strategy") in ("channel", "tensor"):
        return found._replace(packing=f"fp8_rows:{weights['strategy']}")
    return found


def _modelopt(raw: dict, source: str) -> Quantisation:
    algorithm = str(raw.get("quant_algo"))
    bits = {"NVFP4": 4.5, "FP8": 8.0, "W4A16_AWQ": 4.125, "W8A8_SQ_PER_CHANNEL": 8.0}.get(algorithm)
    packing = {"NVFP4": "nvfp4", "FP8": "fp8_rows:tensor"}.get(algorithm)
    return Quantisation(f"{algorithm} (NVIDIA ModelOpt)", bits, source, packing=packing, skipped=_patterns(raw))


def _bitsandbytes(raw: dict, source: str) -> Quantisation:
    four = bool(raw.get("load_in_4bit") or raw.get("_load_in_4bit"))
    kind = f"bitsandbytes {raw.get('bnb_4bit_quant_type', 'fp4').upper()}" if four else "bitsandbytes INT8"
    return Quantisation(kind, 4.5 if four else 8.0, source, skipped=_patterns(raw))


def _groups(method: str, bits, group, source: str, *, beside: int, zeros=False, raw: dict, kind: str = "INT") -> Quantisation:
    """Weights of `bits` in groups that each have `beside` bits of scale, and if zeros a zero point of `bits`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16:
        return Quantisation(method, None, source, skipped=_patterns(raw))
    grouped, beside = isinstance(group, int) and group > 0, beside + bits * zeros
    words = f"{method} {kind}{bits}{f' in groups of {group}' if grouped else ''}"
    return Quantisation(words, bits + (beside / group if grouped else 0.0), source, skipped=_patterns(raw))


def _grouped(kind: str, bits, group, more: str = "") -> str | None:
    """The packing of codes of 4 bits in groups; None for others."""
    return f"{kind}:{group}{more}" if bits == 4 and isinstance(group, int) and group > 0 else None


def _patterns(raw: dict) -> tuple[str, ...]:
    """Names of modules that are not quantised, under the keys of the formats."""
    for key in ("modules_to_not_convert", "ignore", "exclude_modules", "llm_int8_skip_modules"):
        if isinstance(raw.get(key), list):
            return tuple(str(name) for name in raw[key])
    return ()


_METHODS = {
    "fp8": _fp8, "mxfp4": _mxfp4, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "modelopt": _modelopt,
    "modelopt_fp4": _modelopt, "bitsandbytes": _bitsandbytes, OWN_METHOD: _own,
}  # fmt: skip
_MARKS = (  # ends of names and types of tensors, from what is most particular to what is least
    ({"qweight", "g_idx"}, "GPTQ", None),
    ({"qweight", "qzeros"}, "AWQ", None),
    ({"weight_packed", "weight_shape"}, "compressed-tensors", None),
    ({"weight_scale_2", "U8"}, "NVFP4", 4.5),
    ({"weight_scale", "F8_E4M3"}, "FP8", 8.0),
    ({"SCB"}, "bitsandbytes INT8", 8.0),
    ({"absmax"}, "bitsandbytes", 4.5),
    ({"F8_E4M3"}, "FP8", 8.0),
)
