"""Which weights and experts an adapter changes: the inventory of a checkpoint with what is to be added to each."""

import collections
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specmoe_jax.checkpoints.adapters.low_rank import LowRank
from specmoe_jax.checkpoints.adapters.peft import Adapter, Pair
from specmoe_jax.checkpoints.experts import AdaptedWeight
from specmoe_jax.checkpoints.inventory import Inventory
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.published.published_names import BODIES, HEAD, OWN
from specmoe_jax.models.spec import Part, spec_leaves
from specmoe_jax.support.errors import CheckpointError


class _Place(NamedTuple):
    """A part of the layouts of one expert."""

    moe: int
    expert: int
    part: Part


Deltas = dict[tuple[int, int], list[tuple[Callable, LowRank]]]  # of experts: with the view of the block that they are added to


def adapted(config: ModelConfig, inventory: Inventory, adapter: Adapter) -> Inventory:
    """The inventory with an adapter's matrices beside what they are added to. Raises CheckpointError for what cannot be merged."""
    weights, experts = dict(inventory.weights), collections.defaultdict(list)
    shapes = {spec.name: spec.shape for spec in spec_leaves(family_of(config).weight_specs(config))}
    parts = _expert_parts(config)
    for pair in adapter.pairs:
        name = _canonical(config, pair.module)
        if (own := f"{name}.weight") in weights:
            base = weights[own]
            if isinstance(base, AdaptedWeight):
                raise CheckpointError(f"{pair.where}: two pairs of matrices are for this weight of the model; expected one")
            weights[own] = AdaptedWeight(base, _of_matrix(adapter, pair, shapes[own]))
        elif own in parts:
            _add(experts, inventory, pair, ((place, _of_matrix(adapter, pair, place.part.spec.shape)) for place in parts[own]))
        else:
            _add(experts, inventory, pair, _of_all_experts(config, adapter, pair, name, parts))
    changed = tuple(
        tuple(source._replace(deltas=tuple(experts[moe, expert])) for expert, source in enumerate(layer))
        for moe, layer in enumerate(inventory.experts)
    )
    return inventory._replace(weights=weights, experts=changed)


def _canonical(config: ModelConfig, module: str) -> str:
    """A module's name as the specs spell it, whatever wrapper the adapter was trained in."""
    if module.removeprefix("language_model.") == HEAD.removesuffix(".weight"):
        return HEAD.removesuffix(".weight")
    body = next(body for body in sorted(BODIES, key=len, reverse=True) if module.startswith(body))
    name = family_of(config).canonical_name(f"{OWN}{module.removeprefix(body)}.weight")
    return (name or module).removesuffix(".weight")


def _expert_parts(config: ModelConfig) -> dict[str, list[_Place]]:
    """Of every name that an expert's matrix is stored under, in any layout of the family."""
    parts: dict[str, list[_Place]] = collections.defaultdict(list)
    for moe, layer in enumerate(config.expert_layers):
        for expert in range(config.num_experts):
            for layout in family_of(config).expert_layouts(config, layer, expert):
                for part in layout:
                    parts[part.name].append(_Place(moe, expert, part))
    return parts


def _add(experts: Deltas, inventory: Inventory, pair: Pair, found) -> None:
    for place, delta in found:
        if inventory.experts[place.moe][place.expert].stays_packed:
            raise CheckpointError(f"{pair.where}: its experts are packed and cannot be merged; load them with expert_dtype=decoded")
        experts[place.moe, place.expert].append((place.part.view, delta))


def _of_matrix(adapter: Adapter, pair: Pair, shape: tuple[int, ...]) -> LowRank:
    (rank, inputs), outputs = pair.a.shape, len(pair.b)
    if shape != (outputs, inputs):
        raise CheckpointError(f"{pair.where}: is of {[outputs, inputs]}, the model's matrix of {list(shape)}: another base model?")
    return LowRank(pair.a, pair.b, adapter.scale(rank, pair.module))


def _of_all_experts(config: ModelConfig, adapter: Adapter, pair: Pair, name: str, parts: dict[str, list[_Place]]):
    """PEFT's form of a parameter with all experts of a layer, which does not say which parameter: the shapes do.

    -> places and deltas. a: [E * rank, in], the ranks of an expert together; b: [out, rank * E], those of a rank together.
    """
    inside = [part for part in parts if part.rpartition(".")[0] == name]
    if not inside:
        raise CheckpointError(f"{pair.where}: the model has no matrix of this name; is the adapter of another base model?")
    inputs, outputs, count = pair.a.shape[1], len(pair.b), config.num_experts
    for own in inside:
        as_stored = _stored_transposed(config, parts[own][0])
        for transposed in (as_stored, not as_stored):
            wanted = (count, inputs, outputs) if transposed else (count, outputs, inputs)
            places = [place for place in parts[own] if place.part.spec.shape == wanted]
            if places and pair.a.shape[0] % count == 0:
                rank = pair.a.shape[0] // count
                a, b = pair.a.reshape(count, rank, inputs), pair.b.reshape(outputs, rank, count)
                scale = adapter.scale(rank, f"{pair.module}.{own.rpartition('.')[2]}", pair.module)
                return [
                    (place, LowRank(a[place.expert], np.ascontiguousarray(b[..., place.expert]), scale, transposed))
                    for place in places
                ]
    raise CheckpointError(
        f"{pair.where}: is of {count} matrices of {[outputs, inputs]}; none of the model's experts has this shape"
    )


def _stored_transposed(config: ModelConfig, place: _Place) -> bool:
    """Whether a tensor of all experts holds [in, out] where both are equal: told by where its numbers go in the block."""
    view = place.part.view(np.empty(config.layer_experts[place.moe].block_shape, np.float32))
    columns_are_inputs = view.strides[-1] == view.itemsize
    return columns_are_inputs if "down" in place.part.name.rpartition(".")[2] else not columns_are_inputs
