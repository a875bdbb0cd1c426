"""The layer for further tokens out of the target's own checkpoint: every tensor expected, none left over."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from specmoe_jax.checkpoints.experts import ExpertSource, Weight, read_expert, read_weight
from specmoe_jax.checkpoints.files import Checkpoint, open_checkpoint
from specmoe_jax.checkpoints.inventory import canonical_names, further_prefixes, layer_sources, take_weights
from specmoe_jax.checkpoints.published.names import Names
from specmoe_jax.checkpoints.published.quantisation import as_stored
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import QUANTISED
from specmoe_jax.models import mtp
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.models.published.naming import mtp_prefixes
from specmoe_jax.models.spec import TensorSpec, map_specs, spec_leaves
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.support.jax_settings import lenient

COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the target's matrices, stored again beside the layer


class MtpTensors(NamedTuple):
    """weights: by name of the spec; experts: of each layer that has any, one source each. Headers alone have been read."""

    weights: dict[str, Weight]
    experts: tuple[tuple[ExpertSource, ...], ...]


def find_mtp(path: pathlib.Path, config: ModelConfig, checkpoint: Checkpoint | None = None) -> MtpTensors:
    """The layers' tensors in a directory, or in the checkpoint that was opened there.

    Raises CheckpointError, one line, where there is none, or not all of it.
    """
    checkpoint = checkpoint or open_checkpoint(path)
    config = as_stored(path, config, checkpoint)
    names = _names(config, checkpoint)
    stored = take_weights(config, names, spec_leaves(mtp.all_weight_specs(config)))
    whole = mtp.extended(config).with_packing(config.packing)  # the layers are stored like the others
    experts = tuple(layer_sources(whole, names, moe) for moe in range(config.num_expert_layers, whole.num_expert_layers))
    names.raise_if_missing()
    names.raise_if_unused()
    return MtpTensors(weights=stored, experts=experts)


def holds_mtp(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether there is any tensor of the layer that config.json names."""
    return config.mtp_layers > 0 and any(map(_own_names(config, checkpoint), checkpoint.tensors))


@lenient()
def load_mtp(model: Model, *, expert_dtype: str | None = None, experts_on_host: bool = False) -> MtpHead:
    """The layers of a model that was loaded from a directory, in its dtype, all experts on the accelerator.

    expert_dtype: what their experts are packed as (Plan.draft_expert_dtype); None decodes those that are stored packed.
    experts_on_host: in host memory instead, for plans whose draft_experts of them are on the accelerator at a time.
    Raises CheckpointError as `find_mtp`.
    """
    if expert_dtype is not None and expert_dtype not in QUANTISED:
        raise RequestError(f"expert_dtype is {expert_dtype!r}; it must be one of {', '.join(QUANTISED)}, or None")
    if model.path is None:
        raise CheckpointError("this model is not a checkpoint as it was loaded, and draft=mtp takes its layer from one")
    found, config = find_mtp(model.path, model.config), mtp.layer_config(model.config, expert_dtype)

    def weight(spec: TensorSpec) -> jax.Array:
        return jax.device_put(read_weight(found.weights[spec.name], spec.in_dtype(model.dtype), check_finite=True))

    def layer(index: int) -> mtp.Layer:
        sources = (source._replace(decode=True) for source in found.experts[index]) if found.experts else ()
        blocks = [read_expert(source, model.dtype, check_finite=True) for source in sources]
        weights = map_specs(weight, mtp.weight_specs(model.config, index))
        return mtp.Layer(config, weights, mtp.in_memory(config, blocks, on_host=experts_on_host))

    return mtp.attach(model, [layer(index) for index in range(model.config.mtp_layers)])


def load_planned_mtp(model: Model, plan: Plan) -> MtpHead:
    """As a plan wants it."""
    return load_mtp(model, expert_dtype=plan.draft_expert_dtype, experts_on_host=plan.draft_experts is not None)


def _names(config: ModelConfig, checkpoint: Checkpoint) -> Names:
    """The layer's tensors alone."""
    if config.mtp_layers == 0:
        raise CheckpointError("config.json: num_nextn_predict_layers is 0; draft=mtp needs a layer that predicts further tokens")

    own = _own_names(config, checkpoint)
    if not holds_mtp(config, checkpoint):
        raise CheckpointError(
            f"{checkpoint.path}: holds no tensor {mtp_prefixes(config)[0]}*, which draft=mtp needs; many conversions leave that "
            "layer out: take a checkpoint as published, or another draft"
        )
    return Names(checkpoint, canonical=own)


def _own_names(config: ModelConfig, checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """A stored name -> the specs' name of it; None for what is not the layer's, or a copy of the target's."""
    prefixes, canonical = further_prefixes(config), canonical_names(config, checkpoint)

    def own(name: str) -> str | None:
        found = canonical(name)
        return found if found is not None and found.startswith(prefixes) and not found.endswith(COPIES) else None

    return own
