"""The rope_parameters of a config.json -> rotary frequencies. The scaling rules differ only here, before any model runs."""

import math
from collections.abc import Callable

from specmoe_jax.config.layer_config import Rope
from specmoe_jax.models.published.config_json import flag, number, show, size
from specmoe_jax.support.errors import CheckpointError


def read_rope(raw: dict, dim: int, *, default_theta: float, interleaved: bool = False, rotated: float | None = None) -> Rope:
    """The Rope of heads with `dim` numbers. Raises CheckpointError for a rope_type that is not built.

    Newer configs hold rope_parameters {rope_theta, rope_type, ...}; older ones rope_theta, and rope_scaling where scaled.
    rotated: the share of each head that the family rotates where partial_rotary_factor does not say; None: all, always.
    """
    parameters = parameters_of(raw)
    kind = rope_type(raw)
    if not isinstance(kind, str) or kind not in _RULES:
        raise CheckpointError(f"config.json: rope_type is {show(kind)}; built are {', '.join(_RULES)}")
    dim = _rotated_dim(parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")), dim, rotated)
    theta = number(parameters, "rope_theta", number(raw, "rope_theta", default_theta))
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}; it must be above 1")
    if "original_max_position_embeddings" not in parameters:
        parameters = parameters | {"original_max_position_embeddings": size(raw, "max_position_embeddings")}
    frequencies, scale = _RULES[kind](parameters, theta, dim)
    return Rope(frequencies=frequencies, scale=scale, interleaved=interleaved)


def _rotated_dim(factor: float | None, dim: int, default: float | None) -> int:
    """How many numbers of a head are rotated, an even number, from the front."""
    if default is None:
        if factor not in (None, 1.0):
            raise CheckpointError("config.json: partial_rotary_factor is not 1; heads are built rotated in full")
        return dim
    factor = default if factor is None else factor
    rotated = int(dim * number({"partial_rotary_factor": factor}, "partial_rotary_factor", default))
    if not 0 < rotated <= dim or rotated % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {show(factor)}; of heads of {dim} it must leave an even number, at least 2"
        )
    return rotated


def parameters_of(raw: dict) -> dict:
    """What the config says beyond rope_theta; empty when it says nothing."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"config.json: rope_parameters is {show(parameters)}; it must be an object")
    return parameters


def rope_type(raw: dict) -> str:
    """The name of the scaling rule."""
    parameters = parameters_of(raw)
    return parameters.get("rope_type") or parameters.get("type") or "default"


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Peng et al. 2023 (YaRN), 3.4: how much sharper scores must be when positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _plain(parameters: dict, theta: float, dim: int) -> tuple[tuple[float, ...], float]:
    return Rope.plain(theta, dim).frequencies, 1.0


def _linear(parameters: dict, theta: float, dim: int) -> tuple[tuple[float, ...], float]:
    """Positions divided by the factor."""
    factor = _positive(parameters, "factor")
    return tuple(f / factor for f in Rope.plain(theta, dim).frequencies), 1.0


def _llama3(parameters: dict, theta: float, dim: int) -> tuple[tuple[float, ...], float]:
    """Llama 3.1: long waves divided by the factor, short ones kept, a linear blend between; a step where there is no between."""
    factor, low, high = (_positive(parameters, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if low > high:
        raise CheckpointError(f"config.json: low_freq_factor is {low}; it must be at most high_freq_factor, {high}")
    original = size(parameters, "original_max_position_embeddings")

    def scaled(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)  # of this pair within the original window
        kept = float(turns >= low) if low == high else min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - kept) * frequency / factor + kept * frequency

    return tuple(scaled(f) for f in Rope.plain(theta, dim).frequencies), 1.0


def _yarn(parameters: dict, theta: float, dim: int) -> tuple[tuple[float, ...], float]:
    """Peng et al. 2023 (YaRN): blended by the number of turns in the original window; cos and sin scaled."""
    factor, original = _positive(parameters, "factor"), size(parameters, "original_max_position_embeddings")
    fast, slow = number(parameters, "beta_fast", 32) or 32, number(parameters, "beta_slow", 1) or 1

    def pair_with(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(fast), pair_with(slow)
    if flag(parameters, "truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 * (first == last)
    stretched = (min(max((i - first) / (last - first), 0.0), 1.0) for i in range(dim // 2))
    plain = Rope.plain(theta, dim).frequencies
    return tuple(f / factor * s + f * (1 - s) for f, s in zip(plain, stretched, strict=True)), _yarn_scale(parameters, factor)


def _yarn_scale(parameters: dict, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _positive(parameters, "attention_factor")
    mscale, all_dim = number(parameters, "mscale", 0), number(parameters, "mscale_all_dim", 0)
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def _positive(parameters: dict, key: str) -> float:
    value = number(parameters, key, -1.0)
    if value <= 0:
        raise CheckpointError(f"config.json: rope {key} is {show(parameters.get(key))}; it must be a number above 0")
    return value


_RULES: dict[str, Callable] = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
