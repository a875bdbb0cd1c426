"""Names: which stored tensor is which weight, with nothing missing, nothing left over and every shape as configured."""

from typing import NamedTuple

from specmoe_jax.checkpoints.files import INDEX_FILE, SINGLE_FILE, Checkpoint, StoredTensor
from specmoe_jax.checkpoints.header import quote_list
from specmoe_jax.checkpoints.tensors import ExpertSource, Piece, whole
from specmoe_jax.config import ModelConfig
from specmoe_jax.errors import CheckpointError
from specmoe_jax.models.families import family_of
from specmoe_jax.models.spec import ExpertSpec, TensorSpec, spec_leaves

MAX_EXPERTS = 1 << 17  # the largest published models have some 23,000; a sparse file can claim any number
BLOCK_PREFIX, PADDING_PREFIX = "specmoe.expert.", "specmoe.padding."


class Inventory(NamedTuple):
    """weights: canonical name -> tensor, for every spec of the family. experts: [layer][expert]."""

    weights: dict[str, StoredTensor]
    experts: tuple[tuple[ExpertSource, ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes that a full load reads."""
        return self.weight_bytes + sum(source.bytes for layer in self.experts for source in layer)

    @property
    def weight_bytes(self) -> int:
        """Those of everything but the experts."""
        return sum(tensor.entry.bytes for tensor in self.weights.values())


def block_name(layer: int, expert: int) -> str:
    """Name of an expert's block in the converted format."""
    return f"{BLOCK_PREFIX}{layer}.{expert}"


def take_inventory(config: ModelConfig, checkpoint: Checkpoint) -> Inventory:
    """Matches a checkpoint with its config. Raises CheckpointError naming what is missing, unused or of the wrong shape."""
    if config.num_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {config.num_layers}, but {_file(checkpoint)} holds"
            f" {len(checkpoint.tensors)} tensors in all"
        )
    if config.num_layers * config.num_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json: {config.num_layers} layers of {config.num_experts} experts; at most {MAX_EXPERTS} experts in all"
        )
    names = _Names(config, checkpoint)
    weights = {spec.name: names.take(spec) for spec in spec_leaves(family_of(config).weight_specs(config))}
    names.raise_if_missing()  # the router's shape has now confirmed the number of experts that is counted to next
    experts = tuple(
        tuple(_expert(config, names, layer, expert) for expert in range(config.num_experts)) for layer in range(config.num_layers)
    )
    names.raise_if_missing()
    names.raise_if_unused()
    return Inventory(weights=weights, experts=experts)


class _Names:
    """The tensors by canonical name, and which of them have been asked for."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint):
        canonical = family_of(config).canonical_name
        self._file, self._tied = _file(checkpoint), config.tie_embeddings
        self._tensors = {canonical(name): tensor for name, tensor in checkpoint.tensors.items()}
        self._missing: dict[str, None] = {}  # an ordered set
        self._unused = {name for name in self._tensors if not name.startswith(PADDING_PREFIX)}
        if len(self._tensors) < len(checkpoint.tensors):
            twice = [name for name in checkpoint.tensors if canonical(name) != name and canonical(name) in checkpoint.tensors]
            raise CheckpointError(f"{self._file}: tensor {quote_list(twice)}: stored under two names; expected one")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, spec: TensorSpec) -> StoredTensor | None:
        """The tensor of a spec; None, and remembered as missing, when there is none. Raises for a wrong shape or dtype."""
        if spec.name not in self._tensors:
            self._missing[spec.name] = None
            return None
        self._unused.discard(spec.name)
        tensor = self._tensors[spec.name]
        if tensor.entry.shape != spec.shape:
            hint = ": it is transposed" if tensor.entry.shape == spec.shape[::-1] else ""
            raise CheckpointError(
                f"{tensor.where}: shape is {list(tensor.entry.shape)}; config.json asks for {list(spec.shape)}{hint}"
            )
        assert tensor.dtype  # raises CheckpointError for integers
        return tensor

    def raise_if_missing(self) -> None:
        if self._missing:
            count = len(self._missing)
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} missing that config.json asks for:"
                f" {quote_list(list(self._missing))}"
            )

    def raise_if_unused(self) -> None:
        if self._unused:
            tied = self._tied and "lm_head.weight" in self._unused
            hint = "; config.json says tie_word_embeddings, so lm_head is expected to be absent" if tied else ""
            count = len(self._unused)
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} that this model does not use:"
                f" {quote_list(sorted(self._unused))}{hint}"
            )


def _expert(config: ModelConfig, names: _Names, layer: int, expert: int) -> ExpertSource | None:
    """The first layout that the checkpoint has: our block, fused [E, ...] tensors, one tensor a matrix."""
    spec = family_of(config).expert_specs(config, layer, expert)
    if names.has(block_name(layer, expert)):
        return _from_block(names, block_name(layer, expert), spec)
    gate_up, down = family_of(config).fused_expert_specs(config, layer)
    if names.has(gate_up.name) or names.has(down.name):
        return _from_fused(names, gate_up, down, spec, expert)
    parts = [names.take(part) for part in spec]
    if None in parts:
        return None
    return ExpertSource(*(whole(part) for part in parts), down_transposed=False)


def _from_block(names: _Names, name: str, spec: ExpertSpec) -> ExpertSource:
    block, size = names.take(TensorSpec(name, spec.block_shape)), spec.gate.size
    return ExpertSource(*(Piece(block, i * size, spec.gate.shape) for i in range(3)), down_transposed=True)


def _from_fused(names: _Names, gate_up: TensorSpec, down: TensorSpec, spec: ExpertSpec, expert: int) -> ExpertSource | None:
    stored_gate_up, stored_down = names.take(gate_up), names.take(down)
    if stored_gate_up is None or stored_down is None:
        return None
    size = spec.gate.size
    return ExpertSource(
        gate=Piece(stored_gate_up, 2 * expert * size, spec.gate.shape),
        up=Piece(stored_gate_up, (2 * expert + 1) * size, spec.up.shape),
        down=Piece(stored_down, expert * size, spec.down.shape),
        down_transposed=False,
    )


def _file(checkpoint: Checkpoint) -> str:
    """The file to name for what concerns all tensors."""
    return INDEX_FILE if [f.name for f in checkpoint.files] not in ([SINGLE_FILE], []) else SINGLE_FILE
