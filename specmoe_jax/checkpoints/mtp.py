"""The layer for further tokens out of the target's own checkpoint: every tensor expected, none left over."""

import jax
import jax.numpy as jnp

from specmoe_jax.checkpoints.files import Checkpoint, StoredTensor, open_checkpoint
from specmoe_jax.checkpoints.inventory import Names, expert_source
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.checkpoints.tensors import read_expert, read_tensor
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import mtp
from specmoe_jax.models.families.naming import mtp_prefixes
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.models.spec import map_specs, spec_leaves
from specmoe_jax.support.errors import CheckpointError

COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the target's matrices, stored again beside the layer


def load_mtp(model: Model) -> MtpHead:
    """The layer of a model that was loaded from a directory, in its dtype, all experts on the accelerator.

    Raises CheckpointError, one line, where the model has no such layer or its checkpoint lacks the tensors.
    """
    if model.path is None:
        raise CheckpointError("this model is not a checkpoint as it was loaded, and draft=mtp takes its layer from one")
    checkpoint = open_checkpoint(checkpoint_path(str(model.path)))
    names = _names(model.config, checkpoint)
    stored = {spec.name: names.take(spec) for spec in spec_leaves(mtp.weight_specs(model.config))}
    config = mtp.extended(model.config)
    sources = [expert_source(config, names, config.num_expert_layers - 1, expert) for expert in range(config.num_experts)]
    names.raise_if_missing()
    names.raise_if_unused()

    def weight(spec) -> jax.Array:
        return jax.device_put(read_tensor(stored[spec.name], spec.in_dtype(model.dtype), check_finite=True))

    blocks = [jax.device_put(read_expert(source, model.dtype, check_finite=True)) for source in sources]
    return mtp.attach(model, map_specs(weight, mtp.weight_specs(model.config)), jnp.stack(blocks))


def _names(config: ModelConfig, checkpoint: Checkpoint) -> Names:
    """The layer's tensors alone."""
    prefixes, canonical = mtp_prefixes(config), family_of(config).canonical_name
    if not prefixes:
        raise CheckpointError("config.json: num_nextn_predict_layers is 0; draft=mtp needs a layer that predicts further tokens")
    if len(prefixes) > 1:
        raise CheckpointError(f"config.json: num_nextn_predict_layers is {len(prefixes)}; draft=mtp is built for 1")

    def own(name: str) -> str | None:
        found = canonical(name)
        return found if found is not None and found.startswith(prefixes) and not found.endswith(COPIES) else None

    found: dict[str, StoredTensor] = {name: t for name, t in checkpoint.tensors.items() if own(name)}
    if not found:
        raise CheckpointError(
            f"{checkpoint.path}: holds no tensor {prefixes[0]}*, which draft=mtp needs; many conversions leave that "
            "layer out: take a checkpoint as published, or another draft"
        )
    return Names(checkpoint, canonical=own)
