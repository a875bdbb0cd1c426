"""Names: which stored tensor is which weight, with nothing missing, nothing left over and every shape as configured."""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.checkpoints.files import INDEX_FILE, SINGLE_FILE, Checkpoint, StoredTensor
from specmoe_jax.checkpoints.header import quote_list
from specmoe_jax.checkpoints.tensors import ExpertSource, Piece, check_copy, whole
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.published.naming import mtp_prefixes
from specmoe_jax.models.published.published_names import BUFFERS, HEAD, spelling_of
from specmoe_jax.models.spec import Layout, Part, TensorSpec, spec_leaves
from specmoe_jax.support.errors import CheckpointError

MAX_EXPERTS = 1 << 17  # the largest published models have some 23,000; a sparse file can claim any number
_log = logging.getLogger(__name__)
BLOCK_PREFIX, PADDING_PREFIX = "specmoe.expert.", "specmoe.padding."


class Inventory(NamedTuple):
    """weights: canonical name -> tensor, for every spec of the family. experts: [i][expert], of the i-th layer that has any.

    left_out: stored names of other parts of the model (a vision tower, layers for further tokens).
    copies: of the tied embedding, which some writers store again. embedding: the canonical name of the embedding.
    """

    weights: dict[str, StoredTensor]
    experts: tuple[tuple[ExpertSource, ...], ...]
    left_out: tuple[str, ...] = ()
    copies: tuple[StoredTensor, ...] = ()
    embedding: str = ""

    @property
    def bytes(self) -> int:
        """Bytes that a full load reads."""
        return self.weight_bytes + sum(source.bytes for layer in self.experts for source in layer)

    @property
    def weight_bytes(self) -> int:
        """Those of everything but the experts."""
        return sum(tensor.entry.bytes for tensor in self.weights.values())


def block_name(moe: int, expert: int) -> str:
    """Name of an expert's block in the converted format, of the moe-th layer that has experts."""
    return f"{BLOCK_PREFIX}{moe}.{expert}"


def take_inventory(config: ModelConfig, checkpoint: Checkpoint) -> Inventory:
    """Matches a checkpoint with its config. Raises CheckpointError naming what is missing, unused or of the wrong shape."""
    if config.num_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {config.num_layers}, but {_file(checkpoint)} holds"
            f" {len(checkpoint.tensors)} tensors in all"
        )
    if config.num_expert_layers * config.num_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json: {config.num_expert_layers} layers of {config.num_experts} experts; at most {MAX_EXPERTS} experts in all"
        )
    specs = family_of(config).weight_specs(config)
    names = Names(checkpoint, canonical=_without_mtp(config, checkpoint))
    weights = {spec.name: names.take(spec) for spec in spec_leaves(specs)}
    names.raise_if_missing()  # the router's shape has now confirmed the number of experts that is counted to next
    experts = tuple(
        tuple(expert_source(config, names, moe, expert) for expert in range(config.num_experts))
        for moe in range(config.num_expert_layers)
    )
    names.raise_if_missing()
    copies = tuple(names.take_copy(name, specs.embed) for name in _copies_of_embedding(config) if names.has(name))
    names.raise_if_unused()
    return Inventory(weights=weights, experts=experts, left_out=names.left_out, copies=copies, embedding=specs.embed.name)


def check_copies(inventory: Inventory) -> None:
    """Raises CheckpointError where a copy of the tied embedding is another matrix."""
    for copy in inventory.copies:
        check_copy(copy, inventory.weights[inventory.embedding])


def further_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What the names of tensors of layers for further tokens begin with: the family's, and of the converted format."""
    blocks = (f"{BLOCK_PREFIX}{config.num_expert_layers + i}." for i in range(config.mtp_layers))
    return (*mtp_prefixes(config), *blocks)


def canonical_names(config: ModelConfig, checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """A stored name -> the specs' name of it: what is common to all publishers of checkpoints, then what is the family's own."""
    embedding = family_of(config).weight_specs(config).embed.name
    spelling, own = spelling_of(checkpoint.tensors.keys(), embedding), family_of(config).canonical_name

    def canonical(name: str) -> str | None:
        spelled = spelling(name)
        return None if spelled is None else own(spelled)

    return canonical


def _without_mtp(config: ModelConfig, checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """Canonical names of the model alone: what its layers for further tokens hold is a draft's (checkpoints/mtp.py)."""
    prefixes, canonical = further_prefixes(config), canonical_names(config, checkpoint)

    def of(name: str) -> str | None:
        own = canonical(name)
        return None if own is None or own.startswith(prefixes) else own

    return of


def _copies_of_embedding(config: ModelConfig) -> tuple[str, ...]:
    return (HEAD, *getattr(family_of(config), "COPIES_OF_EMBEDDING", ())) if config.tie_embeddings else ()


class Names:
    """The tensors by canonical name, and which of them have been asked for.

    canonical: a stored name -> the specs' name of it, None for what is not used on purpose.
    """

    def __init__(self, checkpoint: Checkpoint, *, canonical: Callable[[str], str | None] = str):
        self._file = _file(checkpoint)
        used = {name: tensor for name, tensor in checkpoint.tensors.items() if canonical(name) is not None}
        self.left_out = tuple(name for name in checkpoint.tensors if name not in used and not name.endswith(BUFFERS))
        if len(used) < len(checkpoint.tensors):
            _log.debug("%s: not used on purpose: %s", self._file, quote_list(sorted(set(checkpoint.tensors) - set(used)), 1 << 20))
        self._tensors = {canonical(name): tensor for name, tensor in used.items()}
        self._missing: dict[str, None] = {}  # an ordered set
        self._unused = {name for name in self._tensors if not name.startswith(PADDING_PREFIX)}
        if len(self._tensors) < len(used):
            twice = [name for name in used if canonical(name) != name and canonical(name) in used]
            raise CheckpointError(f"{self._file}: tensor {quote_list(twice)}: stored under two names; expected one")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def holds(self, spec: TensorSpec) -> bool:
        """Whether there is a tensor of this name and shape."""
        return self.has(spec.name) and self._tensors[spec.name].entry.shape == spec.shape

    def take(self, spec: TensorSpec, *, packed: bool = False, integers: tuple[str, ...] = ()) -> StoredTensor | None:
        """The tensor of a spec; None, and remembered as missing, when there is none. Raises for a wrong shape or dtype.

        packed: bytes of MXFP4 are expected instead of floating-point numbers; integers: one of these types.
        """
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
        if integers:
            if tensor.entry.dtype not in integers:
                raise CheckpointError(f"{tensor.where}: dtype is {tensor.entry.dtype}; expected one of {', '.join(integers)}")
        elif not packed:
            assert tensor.dtype  # raises CheckpointError for integers
        elif tensor.entry.dtype != "U8":
            raise CheckpointError(f"{tensor.where}: dtype is {tensor.entry.dtype}; MXFP4 is stored as U8")
        return tensor

    def take_copy(self, name: str, spec: TensorSpec) -> StoredTensor | None:
        """A tensor that repeats the one of a spec, under another name."""
        return self.take(spec._replace(name=name))

    def raise_if_missing(self) -> None:
        if self._missing:
            count = len(self._missing)
            headless = list(self._missing) == [HEAD]
            hint = ": was it saved from the base class, and the output matrix left out?" if headless else ""
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} missing that config.json asks for:"
                f" {quote_list(list(self._missing))}{hint}"
            )

    def raise_if_unused(self) -> None:
        if self._unused:
            count = len(self._unused)
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} that this model does not use: {quote_list(sorted(self._unused))}"
            )


def expert_source(config: ModelConfig, names: Names, moe: int, expert: int) -> ExpertSource | None:
    """Of the moe-th layer that has experts: our block where the checkpoint has it, else one of the family's layouts."""
    shape = config.experts.block_shape
    if names.has(block_name(moe, expert)):
        block = names.take(TensorSpec(block_name(moe, expert), shape))
        return ExpertSource(pieces=((whole(block), lambda block: block),), block_shape=shape, mapped=True)
    layout = _stored_layout(names, family_of(config).expert_layouts(config, config.expert_layers[moe], expert))
    pieces = [(_piece(names, part), part.view) for part in layout]
    return None if any(piece is None for piece, _ in pieces) else ExpertSource(pieces=tuple(pieces), block_shape=shape)


def _stored_layout(names: Names, layouts: tuple[Layout, ...]) -> Layout:
    """One of whose names there is a tensor that the usual layout lacks; else the first that is there whole; else the usual one.

    Two layouts may share their names and differ in shapes (Qwen3-VL-MoE: published [in, out], saved by newer writers [out, in]).
    """
    usual = {part.name for part in layouts[0]}
    for layout in layouts[1:]:
        if any(names.has(part.name) for part in layout if part.name not in usual):
            return layout
    for layout in layouts:
        if all(names.holds(part.spec) for part in layout):
            return layout
    return layouts[0]


def _piece(names: Names, part: Part) -> Piece | None:
    """What a part says of a stored tensor; None when it is missing."""
    packed = part.scales is not None
    tensor = names.take(part.spec, packed=packed)
    scales = names.take(part.scales, packed=True) if packed else None
    if tensor is None or (packed and scales is None):
        return None
    return _entry(tensor, part.index)._replace(scales=_entry(scales, part.index) if packed else None)


def _entry(tensor: StoredTensor, index: int | None) -> Piece:
    if index is None:
        return whole(tensor)
    shape = tensor.entry.shape[1:]
    return Piece(tensor=tensor, first=index * math.prod(shape), shape=shape)


def _file(checkpoint: Checkpoint) -> str:
    """The file to name for what concerns all tensors."""
    return INDEX_FILE if [f.name for f in checkpoint.files] not in ([SINGLE_FILE], []) else SINGLE_FILE
