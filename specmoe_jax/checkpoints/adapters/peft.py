"""A directory that PEFT has written (adapter_config.json, adapter_model.safetensors) -> the pairs of matrices of its modules.

What is more than W + scale * B A (DoRA, biases, further weights, an initialisation that changes the base) is refused.
"""

import hashlib
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from specmoe_jax.checkpoints.files import StoredTensor, read_bytes, read_header, read_json
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.checkpoints.tensors import read_tensor
from specmoe_jax.support.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_OUTER = "base_model.model."  # what PEFT puts before the names of the model
_MATRIX = re.compile(r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights
_NEUTRAL: dict[str, tuple] = {  # values of fields that change nothing; every other value is refused
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "layer_replication": (None,),
    "trainable_token_indices": (None, {}, []), "use_qalora": (False, None), "alora_invocation_tokens": (None,),
    "use_bdlora": (False, None), "target_conv_1d": (False, None), "kasa_config": (None,), "velora_config": (None,),
}  # fmt: skip


class Pair(NamedTuple):
    """The matrices of one module, or of a parameter of it with all experts: a [rank * E, in], b [out, rank * E] then.

    module: its name without PEFT's own parts; several pairs may have one (parameters). where: for messages.
    """

    module: str
    a: np.ndarray
    b: np.ndarray
    where: str


class Adapter(NamedTuple):
    """raw: the fields of adapter_config.json."""

    path: pathlib.Path
    raw: dict[str, Any]
    pairs: tuple[Pair, ...]

    def scale(self, rank: int, *names: str) -> float:
        """lora_alpha over the rank, or over its root, with what alpha_pattern and rank_pattern say of a module."""
        alpha = self._pattern("alpha_pattern", names, self.raw.get("lora_alpha", 8))
        wanted = self._pattern("rank_pattern", names, self.raw.get("r", 8))
        if rank != wanted:
            raise CheckpointError(f"{WEIGHTS_FILE}: {quote(names[0])}: rank {rank}, but {CONFIG_FILE} says {quote(str(wanted))}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{CONFIG_FILE}: lora_alpha is {quote(str(alpha))}; expected a number")
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def _pattern(self, field: str, names: tuple[str, ...], default: Any) -> Any:
        """PEFT's rule: a key is the end of a name, or an expression that matches it."""
        patterns = self.raw.get(field) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{CONFIG_FILE}: {field} is {quote(str(patterns))}; expected an object")
        try:
            found = (value for key, value in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
            return next(found, default)
        except re.error as e:
            raise CheckpointError(f"{CONFIG_FILE}: {field} holds no regular expression ({e})") from e


def read_adapter(folder: str | pathlib.Path) -> Adapter:
    """Raises CheckpointError, one line that names the file and what cannot be merged."""
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"adapter {quote(str(folder))}: no such directory; give one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    raw = read_json(path / CONFIG_FILE)
    _check_config(raw)
    if not (path / WEIGHTS_FILE).is_file() and (path / "adapter_model.bin").is_file():
        raise CheckpointError(f"{path}: adapter_model.bin is not read; save the adapter anew with PEFT, as {WEIGHTS_FILE}")
    return Adapter(path=path, raw=raw, pairs=_pairs(path / WEIGHTS_FILE))


def adapter_hash(folder: str | pathlib.Path) -> str:
    """An id of an adapter: of its two files."""
    digest = hashlib.sha256(b"specmoe adapter 1")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(hashlib.sha256(read_bytes(pathlib.Path(folder).expanduser() / name, max_bytes=1 << 40)).digest())
    return digest.hexdigest()


def _check_config(raw: dict[str, Any]) -> None:
    for field, neutral in _NEUTRAL.items():
        if field in raw and raw[field] not in neutral:
            given, merged = (quote(str(value), spaces=True) for value in (raw[field], neutral[0]))
            raise CheckpointError(f"{CONFIG_FILE}: {field} is {given}; only {merged} is merged")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{CONFIG_FILE}: init_lora_weights is {quote(start)}, which changes the base model; convert the adapter to plain LoRA"
        )


def _pairs(file: pathlib.Path) -> tuple[Pair, ...]:
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, entry in read_header(file).entries.items():
        matched = _MATRIX.match(name)
        if matched is None or len(entry.shape) != 2:
            raise CheckpointError(f"{file.name}: tensor {quote(name)}: no lora_A or lora_B of a matrix; nothing else is merged")
        values = read_tensor(StoredTensor(file, entry), "float32", check_finite=True)
        found.setdefault((matched["module"].removeprefix(_OUTER), matched["inner"]), {})[matched["side"]] = values
    if not found:
        raise CheckpointError(f"{file.name}: holds no tensor; expected lora_A and lora_B of at least one module")
    pairs = []
    for (module, _), sides in found.items():
        where = f"{file.name}: {quote(module)}"
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1] or not sides["A"].size:
            shapes = ", ".join(f"lora_{side} {list(values.shape)}" for side, values in sorted(sides.items()))
            raise CheckpointError(f"{where}: holds {shapes}; expected lora_A [rank, in] and lora_B [out, rank]")
        pairs.append(Pair(module, sides["A"], sides["B"], where))
    return tuple(pairs)
