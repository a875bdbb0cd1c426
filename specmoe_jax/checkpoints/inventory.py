"""Names: which stored tensor is which weight, with nothing missing, nothing left over and every shape as configured."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from specmoe_jax.checkpoints.experts import ExpertSource, QuantisedMatrix, Weight
from specmoe_jax.checkpoints.files import BLOCK_PREFIX, Checkpoint, StoredTensor
from specmoe_jax.checkpoints.published.names import Names, file_named
from specmoe_jax.checkpoints.tensors import Piece, check_copy, whole
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.packing import packed_bytes, without_packing
from specmoe_jax.models.packing.matrices import MatrixKind
from specmoe_jax.models.packing.parts import PackedPart, matrix_kind, packed_part, separate_parts, stacked_parts
from specmoe_jax.models.published.naming import mtp_prefixes, stacked_layout
from specmoe_jax.models.published.published_names import HEAD, spelling_of
from specmoe_jax.models.spec import Layout, TensorSpec, spec_leaves
from specmoe_jax.support.errors import CheckpointError

MAX_EXPERTS = 1 << 17  # the largest published models have some 23,000; a sparse file can claim any number


class Inventory(NamedTuple):
    """weights: canonical name -> tensor, for every spec of the family. experts: [i][expert], of the i-th layer that has any.

    left_out: stored names of other parts of the model (a vision tower, layers for further tokens).
    copies: of the tied embedding, which some writers store again. embedding: the canonical name of the embedding.
    """

    weights: dict[str, Weight]
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
        return sum(weight.bytes for weight in self.weights.values())

    def decoded(self) -> "Inventory":
        """The same where no expert stays packed."""
        return self._replace(experts=tuple(tuple(source._replace(decode=True) for source in layer) for layer in self.experts))


def block_name(moe: int, expert: int) -> str:
    """Name of an expert's block in the converted format, of the moe-th layer that has experts."""
    return f"{BLOCK_PREFIX}{moe}.{expert}"


def take_inventory(config: ModelConfig, checkpoint: Checkpoint) -> Inventory:
    """Matches a checkpoint with its config. Raises CheckpointError naming what is missing, unused or of the wrong shape."""
    if config.num_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {config.num_layers}, but {file_named(checkpoint)} holds"
            f" {len(checkpoint.tensors)} tensors in all"
        )
    if config.num_expert_layers * config.num_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json: {config.num_expert_layers} layers of {config.num_experts} experts; at most {MAX_EXPERTS} experts in all"
        )
    specs = family_of(config).weight_specs(config)
    names = Names(checkpoint, canonical=_without_mtp(config, checkpoint))
    weights = take_weights(config, names, spec_leaves(specs))
    names.raise_if_missing()  # the router's shape has now confirmed the number of experts that is counted to next
    experts = tuple(layer_sources(config, names, moe) for moe in range(config.num_expert_layers))
    names.raise_if_missing()
    _check_alike(config, experts)
    copies = names.take_all(specs.embed._replace(name=name) for name in _copies_of_embedding(config) if names.has(name))
    names.raise_if_unused()
    return Inventory(
        weights=weights, experts=experts, left_out=names.left_out, copies=tuple(copies.values()), embedding=specs.embed.name
    )


def _check_alike(config: ModelConfig, experts: tuple[tuple[ExpertSource, ...], ...]) -> None:
    """All experts share one pool of slots."""
    for layer, expected, sources in zip(config.expert_layers, config.layer_experts, experts, strict=True):
        if any(source.config.packing != expected.packing for source in sources):
            raise CheckpointError(
                f"{sources[0].pieces[0][0].tensor.where}: layer {layer} holds experts that are not quantised, others are packed as "
                f"{expected.packing}; expected all alike: take a checkpoint without quantisation"
            )


def check_copies(inventory: Inventory) -> None:
    """Raises CheckpointError where a copy of the tied embedding is another matrix."""
    for copy in inventory.copies:
        embedding = inventory.weights[inventory.embedding]
        if isinstance(embedding, QuantisedMatrix):
            raise CheckpointError(
                f"{copy.where}: a copy of an embedding that is stored quantised; one of the two is to be left out"
            )
        check_copy(copy, embedding)


def further_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What the names of tensors of layers for further tokens begin with: the family's, and of the converted format."""
    blocks = (f"{BLOCK_PREFIX}{config.num_expert_layers + i}." for i in range(config.mtp_layers))
    return (*mtp_prefixes(config), *blocks)


def canonical_names(config: ModelConfig, checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """A stored name -> the specs' name of it: what is common to all publishers of checkpoints, then what is the family's own."""
    embedding = family_of(config).weight_specs(config).embed.name
    spelling, family = spelling_of(checkpoint.tensors.keys(), embedding), family_of(config)
    further = getattr(family, "further_name", lambda config, name: name)  # of tensors of layers for further tokens

    def canonical(name: str) -> str | None:
        spelled = spelling(name)
        return None if spelled is None else family.canonical_name(further(config, spelled))

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


def layer_sources(config: ModelConfig, names: Names, moe: int) -> tuple[ExpertSource, ...]:
    """Of the moe-th layer that has experts, those experts of which nothing is missing."""
    sources = [expert_source(config, names, moe, expert) for expert in range(config.num_experts)]
    return tuple(source for source in sources if source is not None)


def expert_source(config: ModelConfig, names: Names, moe: int, expert: int) -> ExpertSource | None:
    """Of the moe-th layer that has experts: our block where the checkpoint has it, else one of the family's layouts."""
    experts, layer = config.layer_experts[moe], config.expert_layers[moe]
    if _is_left_plain(config, names, moe, expert):
        experts = without_packing(experts)
    if names.has(block_name(moe, expert)):
        shape, types = (experts.block_shape, ()) if experts.packing is None else ((packed_bytes(experts),), ("U8",))
        block = names.take(TensorSpec(block_name(moe, expert), shape), types=types)
        assert block is not None
        return ExpertSource(pieces=((whole(block), lambda block: block),), config=experts, mapped=True)
    if experts.packing is not None:
        stacked = matrix_kind(experts.packing).stacked
        parts = stacked_parts(config, moe, expert) if stacked else packed_parts(config, layer, expert)
        pieces = _packed_pieces(names, parts)
        return None if pieces is None else ExpertSource(pieces=pieces, config=experts)
    stacked = stacked_layout(config, layer, expert)
    if names.has(stacked[0].name):
        layout = stacked
    else:
        layout = _stored_layout(names, family_of(config).expert_layouts(config, layer, expert))
    pieces = tuple((_entry(tensor, part.index), part.view) for part in layout if (tensor := names.take(part.spec)) is not None)
    return None if len(pieces) < len(layout) else ExpertSource(pieces=pieces, config=experts)


def _is_left_plain(config: ModelConfig, names: Names, moe: int, expert: int) -> bool:
    """Of a quantised checkpoint: whether this expert is among the modules that were left as they are."""
    packing = config.layer_experts[moe].packing
    if packing is None or matrix_kind(packing).stacked:
        return False
    if names.has(block_name(moe, expert)):
        return names.type_of(block_name(moe, expert)) != "U8"
    layer, mark = config.expert_layers[moe], matrix_kind(packing).mark
    marked = (p.spec.name for p in packed_parts(config, layer, expert) if p.spec.name.endswith(mark))
    plain = family_of(config).expert_layouts(config, layer, expert)[0]
    return not any(map(names.has, marked)) and all(names.holds(part.spec) for part in plain)


def packed_parts(config: ModelConfig, layer: int, expert: int) -> tuple[PackedPart, ...]:
    """What an expert that is stored packed consists of. Raises CheckpointError where its family is not published so."""
    family = family_of(config)
    if hasattr(family, "packed_parts"):
        return family.packed_parts(config, layer, expert)
    parts = separate_parts(config.experts, family.expert_layouts(config, layer, expert)[0])
    if parts is None:
        raise CheckpointError(f"config.json: experts packed as {config.experts.packing}, which is not built for {config.family}")
    return parts


def take_weights(config: ModelConfig, names: Names, specs: Iterable[TensorSpec]) -> dict[str, Weight]:
    """By name the tensors of those specs that have one, quantised or not; the others are remembered as missing."""
    packing = config.experts.packing
    if packing is None:
        return dict(names.take_all(specs))
    taken = {spec.name: _take_matrix(matrix_kind(packing), names, spec) for spec in specs}
    return {name: weight for name, weight in taken.items() if weight is not None}


def _take_matrix(kind: MatrixKind, names: Names, spec: TensorSpec) -> Weight | None:
    module = spec.name.removesuffix(".weight")
    if len(spec.shape) != 2 or not names.has(module + kind.mark):
        return names.take(spec)
    rows, columns = spec.shape
    parts = tuple(packed_part(tensor, module) for tensor in kind.stored(rows, columns))
    pieces = _packed_pieces(names, parts)
    return None if pieces is None else QuantisedMatrix(kind=kind, shape=(rows, columns), pieces=pieces)


def _packed_pieces(names: Names, parts: Iterable[PackedPart]) -> tuple[tuple[Piece, Callable], ...] | None:
    """None where one is missing."""
    wanted = [part for part in parts if not part.optional or names.has(part.spec.name)]
    taken = [(names.take(part.spec, types=part.dtypes), part) for part in wanted]
    pieces = tuple((_entry(tensor, part.index), part.fill) for tensor, part in taken if tensor is not None)
    return pieces if len(pieces) == len(wanted) else None


def _stored_layout(names: Names, layouts: tuple[Layout, ...]) -> Layout:
    """The usual layout, unless there is a tensor that only another one has; of several, the first that is there whole.

    Two layouts may share their names and differ in shapes (Qwen3-VL-MoE: published [in, out], saved by newer writers [out, in]).
    """
    usual = {part.name for part in layouts[0]}
    others = [layout for layout in layouts if any(names.has(part.name) for part in layout if part.name not in usual)]
    candidates = others or layouts
    return next((layout for layout in candidates if all(names.holds(part.spec) for part in layout)), candidates[0])


def _entry(tensor: StoredTensor, index: int | None) -> Piece:
    if index is None:
        return whole(tensor)
    shape = tensor.entry.shape[1:]
    return Piece(tensor=tensor, first=index * math.prod(shape), shape=shape)
