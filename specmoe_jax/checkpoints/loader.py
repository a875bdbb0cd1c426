"""A checkpoint directory -> Model: config, names, headers checked first; then weights, expert by expert."""

import concurrent.futures
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.checkpoints import manifest
from specmoe_jax.checkpoints.adapters.merge import adapted
from specmoe_jax.checkpoints.adapters.peft import read_adapter
from specmoe_jax.checkpoints.conversion import orbax_parts
from specmoe_jax.checkpoints.disk import DiskExperts, PartOfLayer
from specmoe_jax.checkpoints.experts import HostBlocks, read_weight
from specmoe_jax.checkpoints.files import Checkpoint, open_checkpoint, read_json
from specmoe_jax.checkpoints.gguf.folder import folder_of, gguf_in
from specmoe_jax.checkpoints.header import quote, quote_list
from specmoe_jax.checkpoints.inventory import Inventory, check_copies, take_inventory
from specmoe_jax.checkpoints.memory import check_memory
from specmoe_jax.checkpoints.model_tokenizer import load_model_tokenizer, with_end_tokens
from specmoe_jax.checkpoints.published import hub
from specmoe_jax.checkpoints.published.advice import check_form
from specmoe_jax.checkpoints.published.quantisation import as_stored, check_quantisation
from specmoe_jax.checkpoints.tensors import READERS, TARGET_DTYPES
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_fields import DECODED, EXPERT_TIERS
from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing.kinds.gguf import TYPES
from specmoe_jax.models.spec import Weights, map_specs
from specmoe_jax.support.errors import CheckpointError, PinnedMemoryError, RequestError
from specmoe_jax.support.jax_settings import lenient, lenient_thread
from specmoe_jax.support.processes import chosen_devices, is_local
from specmoe_jax.support.progress import bar, note
from specmoe_jax.types import Device

_LOG = logging.getLogger(__name__)
BUNDLED = {"demo": pathlib.Path(__file__).parent / "demo"}


@lenient()
def load_model(
    path_or_name: str,
    *,
    dtype: str | None = None,
    progress: str | bool = False,
    check_finite: bool = True,
    verify: bool = False,
    expert_tier: str = "host",
    expert_dtype: str | None = None,
    adapter: str | pathlib.Path | None = None,
    devices: int = 1,
    homes: np.ndarray | None = None,
) -> Model:
    """A model from "demo", a Hugging Face directory, a GGUF file or the name of a repository, its experts in pinned memory.

    dtype: "float32" (default) or "bfloat16"; stored bfloat16 is kept bit for bit under "bfloat16".
    progress: a bar of bytes read, a mode of progress.bar.
    check_finite: refuse NaN and infinite weights. Experts that are mapped are not read, so not checked again; the
        conversion that laid them out has.
    verify: first compare every tensor with the manifest of hashes in the directory.
    expert_tier: "disk" leaves the experts where they are; an engine whose plan says so reads them as it needs them.
    expert_dtype: None keeps experts of a quantised checkpoint packed as they are stored; "decoded" has them in `dtype`.
    adapter: a directory with a LoRA adapter as PEFT writes it, merged into the weights as they are read (docs/adapters.md).
    devices: of the plan to come, for which experts are pinned each for its own; an engine copies those that are not. homes: [L, E],
        which of them is whose (engine.runtime.plan_homes), None for expert e mod n. Where they are those of several processes, each
        reads the experts of its own alone; others come from the files when they are asked for.
    Peak host memory: the weights and two experts. Of a checkpoint converted to the mappable layout (convert.py) and loaded
    in the dtype it is stored in, the experts are pages of the files, which must not change while the model is in use.
    Raises CheckpointError, one line that names file and tensor.
    """
    dtype = dtype or "float32"
    _check_options(dtype, expert_tier, expert_dtype, devices)
    path = checkpoint_path(path_or_name)
    found = _described(path, expert_dtype, adapter)
    config, inventory = found.config, found.inventory
    on_disk = expert_tier == "disk"
    places = _places(inventory, chosen_devices(devices), homes)
    own = _own_part(inventory, places)
    if not on_disk:
        check_memory(own, dtype, str(path_or_name))
    _say_what_differs(inventory, progress)
    if verify:
        with bar("verify", inventory.bytes, "B", mode=progress, scale=True) as shown:
            manifest.verify(found.checkpoint, shown.update)
    with bar("load", own.weight_bytes if on_disk else own.bytes, "B", mode=progress, scale=True) as shown:
        weights = _read_weights(config, inventory, dtype, check_finite, shown)
        if on_disk:
            experts = DiskExperts(inventory.experts, dtype, check_finite)
        else:
            experts = _read_experts(inventory, dtype, check_finite, shown, places)
    _LOG.info("loaded %s: %s, %s, %d bytes, experts on %s", path, config.family, dtype, inventory.bytes, expert_tier)
    return Model(
        config=config,
        weights=weights,
        experts=experts,
        tokenizer=found.tokenizer,
        dtype=dtype,
        path=path,
        adapter=None if adapter is None else pathlib.Path(adapter).expanduser(),
    )


def is_mapped(path: pathlib.Path, dtype: str) -> bool:
    """Whether a load in this dtype maps all experts of the directory, as its headers say."""
    checkpoint = open_checkpoint(path)
    config = as_stored(path, load_config(path), checkpoint)
    return DiskExperts(take_inventory(config, checkpoint).experts, dtype, check_finite=False).is_mapped


class _Described(NamedTuple):
    """A directory before its weights are read. inventory: the adapter's changes included."""

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer | None
    inventory: Inventory


def _described(path: pathlib.Path, expert_dtype: str | None, adapter: str | pathlib.Path | None) -> _Described:
    if (path / orbax_parts.DESCRIPTION_FILE).exists():
        raise CheckpointError(f"{path}: an Orbax export; convert it first: specmoe convert --format=specmoe")
    check_form(path)
    config = load_config(path)
    tokenizer = load_model_tokenizer(path, config)
    config = with_end_tokens(config, tokenizer)
    checkpoint = open_checkpoint(path)
    check_quantisation(path, config, checkpoint)
    config = as_stored(path, config, checkpoint)
    inventory = take_inventory(config, checkpoint)
    if expert_dtype is not None:
        config, inventory = _decoded(config, inventory, path)
    if adapter is not None:
        inventory = adapted(config, inventory, read_adapter(adapter))
    return _Described(checkpoint, config, tokenizer, inventory)


def _check_options(dtype: str, expert_tier: str, expert_dtype: str | None, devices: int) -> None:
    if expert_tier not in EXPERT_TIERS:
        raise RequestError(f"expert_tier is {expert_tier!r}; it must be one of {', '.join(EXPERT_TIERS)}")
    if expert_dtype not in (None, DECODED):
        raise RequestError(f"expert_dtype is {expert_dtype!r}; a load takes {DECODED!r} or None (others: quantised.quantise)")
    there = len(jax.devices())
    if not 1 <= devices <= there:
        raise RequestError(f"devices is {devices} and there are {there}; give 1 to as many")
    if dtype not in TARGET_DTYPES:
        raise RequestError(f"dtype is {dtype!r}; it must be one of {', '.join(TARGET_DTYPES)}")


def checkpoint_path(path_or_name: str) -> pathlib.Path:
    """The directory of a bundled model, of a path, or of a repository's name (published/hub.py). Raises CheckpointError.

    A GGUF file, or a directory with one and no safetensors, has a directory that stands for it (gguf/folder.py).
    """
    path = BUNDLED.get(path_or_name) or pathlib.Path(path_or_name).expanduser()
    try:
        found = "directory" if path.is_dir() else "gguf" if path.suffix == ".gguf" and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a symlink loop
        found = None
    if found is not None:
        file = path if found == "gguf" else gguf_in(path)
        return path if file is None else folder_of(file)
    if hub.is_name(str(path_or_name)):
        return hub.cached(str(path_or_name)) or hub.download(str(path_or_name))
    raise CheckpointError(
        f"model {quote(str(path_or_name))}: no such directory; give {' or '.join(BUNDLED)}, a directory with config.json"
        " and *.safetensors, a .gguf file, or the name of a repository, org/name (nothing is downloaded for any other text)"
    )


def load_config(path: pathlib.Path) -> ModelConfig:
    """ModelConfig of a directory, what generation_config.json says of its tokens included. Raises CheckpointError.

    Its experts are packed as config.json says.
    """
    raw = read_json(path / "config.json")
    try:
        config = parse_config(raw)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, ZeroDivisionError) as e:
        raise CheckpointError(f"config.json: a value of the wrong kind ({str(e)[:100]})") from e
    file = path / "generation_config.json"
    generation = read_json(file) if file.is_symlink() or file.exists() else {}
    if config.encoder is not None:
        forced = generation.get("forced_bos_token_id", raw.get("forced_bos_token_id"))
        config = config if forced is None else force_first_token(config, forced)
    return as_stored(path, dataclasses.replace(config, eos_token_ids=_eos_token_ids(generation, config)))


def _say_what_differs(inventory: Inventory, progress: str | bool) -> None:
    """Tensors that are left out, and experts that do not stay as they are stored."""
    if inventory.left_out:
        parts = sorted({".".join(name.split(".")[:3]) for name in inventory.left_out})
        note(f"load: {len(inventory.left_out)} tensors of other parts are left out: {quote_list(parts)}", mode=progress)
    if types := _decoded_types(inventory):
        kept = f"these would stay packed: {', '.join(TYPES)}"
        note(f"load: experts in GGUF blocks of {quote_list(types)} are decoded; {kept}", mode=progress)


def _decoded_types(inventory: Inventory) -> list[str]:
    """GGUF types of experts that are not kept packed."""
    plain = (source for layer in inventory.experts for source in layer if not source.stays_packed)
    return sorted({piece.tensor.entry.dtype for source in plain for piece, _ in source.pieces if piece.tensor.form is not None})


def _decoded(config: ModelConfig, inventory: Inventory, path: pathlib.Path) -> tuple[ModelConfig, Inventory]:
    if config.packing is None:
        raise RequestError(f"expert_dtype={DECODED} has no effect: the experts of {path} are not packed; leave it out")
    return config.with_packing(None), inventory.decoded()


def _read_weights(config: ModelConfig, inventory: Inventory, dtype: str, check_finite: bool, shown) -> Weights[jax.Array]:
    check_copies(inventory)

    def weight(spec):
        tensor = inventory.weights[spec.name]
        array = jax.device_put(read_weight(tensor, spec.in_dtype(dtype), check_finite=check_finite))
        shown.update(tensor.bytes)
        return array

    return map_specs(weight, family_of(config).weight_specs(config))


def _places(inventory: Inventory, devices: Sequence[Device], homes: np.ndarray | None) -> list[list[Device]]:
    """[layer][expert], the device of each expert."""
    return [
        [devices[number % len(devices) if homes is None else homes[layer, number]] for number in range(len(own))]
        for layer, own in enumerate(inventory.experts)
    ]


def _own_part(inventory: Inventory, places: list[list[Device]]) -> Inventory:
    """What this process reads of it: the experts of its own devices."""
    layers = (zip(own, devices, strict=True) for own, devices in zip(inventory.experts, places, strict=True))
    return inventory._replace(experts=tuple(tuple(source for source, device in layer if is_local(device)) for layer in layers))


def _read_experts(
    inventory: Inventory, dtype: str, check_finite: bool, shown, places: list[list[Device]]
) -> tuple[Sequence[jax.Array], ...]:
    host_block, loaded = HostBlocks(dtype, check_finite=check_finite), []

    def expert(at):
        source, device = at
        if not is_local(device):
            return None
        try:
            block = host_block(source, device)
        except (PinnedMemoryError, MemoryError) as e:
            said = str(e) if isinstance(e, PinnedMemoryError) else f"an expert of {source.bytes} bytes finds no memory ({e})"
            raise PinnedMemoryError(said, pinned_bytes=sum(loaded)) from e
        loaded.append(block.nbytes)
        shown.update(source.bytes)
        return block

    everything = [pair for own, devices in zip(inventory.experts, places, strict=True) for pair in zip(own, devices, strict=True)]
    blocks = iter(_in_order(expert, everything))
    layers = [tuple(next(blocks) for _ in layer) for layer in inventory.experts]
    if all(is_local(device) for _, device in everything):
        return tuple(layers)
    on_disk = DiskExperts(inventory.experts, dtype, check_finite)
    return tuple(PartOfLayer(held, on_disk[number]) for number, held in enumerate(layers))


def _in_order(function, arguments: list) -> list:
    """The results of READERS threads, or the first error, after which nothing more is begun."""
    pool = concurrent.futures.ThreadPoolExecutor(READERS, initializer=lenient_thread)
    try:
        return list(pool.map(function, arguments))
    finally:
        pool.shutdown(cancel_futures=True)


def force_first_token(config: ModelConfig, token_id: int) -> ModelConfig:
    """The config of an encoder-decoder that begins with this token (forced_bos_token_id: the target language)."""
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < config.vocab_size:
        raise CheckpointError(f"forced_bos_token_id is {quote(str(token_id))}; expected 0 to {config.vocab_size - 1}")
    assert config.encoder is not None
    encoder = dataclasses.replace(config.encoder, start=(config.encoder.start[0], token_id))
    return dataclasses.replace(config, encoder=encoder)


def _eos_token_ids(generation: dict, config: ModelConfig) -> tuple[int, ...]:
    """Those of config.json, then those that generation_config.json adds."""
    value = generation.get("eos_token_id")
    ids = [*config.eos_token_ids, *(value if isinstance(value, list) else [] if value is None else [value])]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"config.json, generation_config.json: eos_token_id {quote(str(token_id))}; expected 0 to {config.vocab_size - 1}"
            )
    return tuple(dict.fromkeys(ids))
