"""A dense checkpoint -> an MoE checkpoint in Qwen2-MoE format: one pass over the layers, a layer in memory at a time.

A dense MLP of N neurons becomes a shared expert of S and E experts of (N - S) / E, of which a token takes A. Qwen2-MoE
weighs them: a zero shared gate is sigmoid(0) = 1/2, and A chosen experts of near-equal renormalised weights get 1/A each;
2 and A go into the down projections, so that what is chosen adds up to what the dense layer computes.
"""

import dataclasses
import functools
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm

from specmoe_jax.checkpoints.carving.carve import Carved, Sizes, carve
from specmoe_jax.checkpoints.carving.dense import DenseModel, open_dense
from specmoe_jax.checkpoints.conversion.model_card import card
from specmoe_jax.checkpoints.conversion.write import Output, write_index, write_safetensors, write_text
from specmoe_jax.checkpoints.loader import load_model
from specmoe_jax.checkpoints.tensors import TARGET_DTYPES
from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.model import reference_attention
from specmoe_jax.models.published.config_json import size
from specmoe_jax.models.spec import LayerWeights, MlpWeights, TensorSpec, map_specs, spec_leaves
from specmoe_jax.support.errors import CheckpointError, RequestError

WINDOW = 256  # tokens of a calibration sequence
SEQUENCES = 8  # at a time
LEAST_TOKENS = 64  # of either text: less measures nothing
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class Report(NamedTuple):
    """Perplexity of the held-back text under the dense and the carved model; tokens calibrated on and measured."""

    dense: float
    carved: float
    calibration_tokens: int
    measured_tokens: int


def carve_checkpoint(
    model: pathlib.Path, output: pathlib.Path, sizes: Sizes, texts: Iterable[str], *, dtype: str = "float32", progress: bool = False
) -> Report:
    """Writes the carved checkpoint into the new directory `output`, whole or not at all.

    model: see `open_dense`. texts: two thirds calibrate, every third measures. Raises CheckpointError or RequestError.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists; give a new directory")
    texts = list(texts)
    with open_dense(model) as dense:
        raw = carved_config(dense.raw, sizes, dtype)
        config = parse_config(raw)
        folder = output.with_name(f".{output.name}.{secrets.token_hex(6)}.partial")  # a name that nobody has
        folder.mkdir(parents=True)
        try:
            dense.write_side_files(folder)
            write_text(folder / "config.json", json.dumps(raw, indent=2))
            calibration, measured = (_windows(folder, texts, third) for third in (False, True))
            before = _write_layers(folder, dense, config, sizes, dtype, calibration, measured, progress)
            after = _perplexity_of_written(folder, dtype, measured)
            report = Report(before, after, calibration.size, measured.size)
            write_text(folder / "README.md", card(dense.title, dense.license, sizes, report))
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return report


def carved_config(raw: dict, sizes: Sizes, dtype: str) -> dict:
    """The config.json of the result. Raises RequestError for sizes that the dense one cannot be cut into."""
    neurons = size(raw, "intermediate_size")
    if not 1 <= sizes.top_k <= sizes.experts or sizes.experts < 2:
        raise RequestError(f"a token takes {sizes.top_k} of {sizes.experts} experts; expected 1 to all of at least 2")
    routed = neurons - sizes.shared
    if sizes.shared < 1 or routed < sizes.experts or routed % sizes.experts:
        raise RequestError(
            f"{neurons} neurons less {sizes.shared} shared ones do not make {sizes.experts} equal experts; "
            f"for example --shared={neurons - sizes.experts * max(1, 2 * neurons // (3 * sizes.experts))} does"
        )
    kept = {key: raw[key] for key in _KEPT if raw.get(key) is not None}
    return kept | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": routed // sizes.experts,
        "shared_expert_intermediate_size": sizes.shared,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": False,
        "dtype": dtype,
    }


def perplexity(losses: Iterable[np.ndarray]) -> float:
    """exp of the mean loss."""
    return float(np.exp(np.concatenate([np.ravel(loss) for loss in losses]).mean()))


@jax.jit
def token_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p of each token given those before it: logits [B, T, V], tokens [B, T] -> [B, T - 1] nats."""
    scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]


def _windows(folder: pathlib.Path, texts: list[str], measured: bool) -> np.ndarray:
    """[sequences, WINDOW] int32 of every third text, or of the others, one after the other; a short rest is dropped."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError("the model has no tokenizer.json; carving calibrates on text and needs one")
    chosen = [text for number, text in enumerate(texts) if (number % 3 == 2) == measured]
    ids = tokenizers.Tokenizer.from_file(str(file)).encode("\n\n".join(chosen), add_special_tokens=False).ids
    if len(ids) < LEAST_TOKENS:
        raise RequestError(f"the calibration text is too short ({len(ids)} tokens in a part); give more lines: --calibration=FILE")
    window = min(WINDOW, len(ids))
    return np.array(ids[: len(ids) // window * window], np.int32).reshape(-1, window)


def _write_layers(
    folder: pathlib.Path, dense: DenseModel, config: ModelConfig, sizes: Sizes, dtype: str, calibration, measured, progress: bool
) -> float:
    """Carves and writes layer by layer, while both texts go through the dense model. -> its perplexity.

    The first file holds what is no layer's.
    """
    specs = family_of(config).weight_specs(config)
    outer = [spec for spec in (specs.embed, specs.final_norm, specs.lm_head) if spec is not None]
    embed = dense.tensor(specs.embed.name)
    texts = [[embed[batch] for batch in _batches(tokens)] for tokens in (calibration, measured)]  # residuals [B, T, M]
    owners = _write(folder, 0, config, {spec.name: dense.tensor(spec.name) for spec in outer}, dtype)
    attend = functools.partial(_attend, config.layers[0])
    for layer in tqdm.trange(config.num_layers, desc="carve", unit="layer", disable=None if progress else True):
        names = specs.layers[layer]
        weights = map_specs(lambda spec: _dense_tensor(dense, spec), _attention_of(names))
        mlp: MlpWeights[np.ndarray] = MlpWeights(
            *(dense.tensor(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        )
        inputs = [[attend(weights, h) for h in text] for text in texts]  # (residual [B, T, M], the MLP's input)
        x = np.concatenate([np.asarray(x).reshape(-1, config.hidden_size) for _, x in inputs[0]])
        carved = carve(x, np.asarray(_hidden(mlp, x)), mlp.down, sizes)
        owners |= _write(folder, layer + 1, config, _layer_tensors(config, layer, names, weights, mlp, carved, sizes), dtype)
        mlp_arrays = jax.tree.map(jnp.asarray, mlp)
        texts = [[h + layers.mlp(mlp_arrays, x) for h, x in text] for text in inputs]
    write_index(folder, owners, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    norm, head = dense.tensor(specs.final_norm.name), dense.tensor(outer[-1].name) if specs.lm_head else embed
    ends = zip(texts[1], _batches(measured), strict=True)
    return perplexity(np.asarray(_losses(config.norm_eps, norm, head, h, tokens)) for h, tokens in ends)


def _attention_of(names: LayerWeights[TensorSpec]) -> LayerWeights[TensorSpec]:
    return dataclasses.replace(names, router=None, mlp=None, shared_gate=None)


def _dense_tensor(dense: DenseModel, spec: TensorSpec) -> np.ndarray:
    """The dense model's own, or zeros for a bias that it has none of."""
    return dense.tensor(spec.name) if spec.name in dense.names else np.zeros(spec.shape, np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _attend(config: LayerConfig, weights: LayerWeights[jax.Array], h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of a dense layer over whole sequences h [B, T, M]. -> the residual after it, the input of its MLP."""
    config = dataclasses.replace(config, router=None, experts=None)
    batch, length, _ = h.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    attended = reference_attention(config.attention, *layers.pre_attention(config, weights, h, positions))
    after, x, _ = layers.post_attention(config, weights, h, attended, jnp.ones((batch, length), bool))
    return after, x.reshape(h.shape)


@jax.jit
def _hidden(mlp: MlpWeights[jax.Array], x: jax.Array) -> jax.Array:
    """[n, N], the activations of the neurons."""
    assert mlp.gate is not None
    return jax.nn.silu(layers.linear(x, mlp.gate)) * layers.linear(x, mlp.up)


@functools.partial(jax.jit, static_argnums=0)
def _losses(eps: float, norm, head, h, tokens):
    return token_losses(layers.linear(layers.rms_norm(h, norm, eps), head), tokens)


def _layer_tensors(
    config: ModelConfig, layer: int, names: LayerWeights, weights: LayerWeights, mlp: MlpWeights, carved: Carved, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Every tensor of a carved layer under its name in the checkpoint."""
    arrays = dataclasses.replace(
        weights,
        router=carved.router,
        mlp=_cut(mlp, carved.shared, times=2),
        shared_gate=np.zeros((1, config.hidden_size), np.float32),
    )
    tensors = {spec.name: array for spec, array in zip(spec_leaves(names), jax.tree.leaves(arrays), strict=True)}
    for expert, neurons in enumerate(carved.groups):
        cut = _cut(mlp, neurons, times=sizes.top_k)
        layout = family_of(config).expert_layouts(config, layer, expert)[0]
        tensors |= dict(zip((part.name for part in layout), (cut.gate, cut.up, cut.down), strict=True))
    return tensors


def _cut(mlp: MlpWeights[np.ndarray], neurons: np.ndarray, *, times: float) -> MlpWeights[np.ndarray]:
    """The MLP of these neurons alone; `times` undoes the weight that its output gets."""
    assert mlp.gate is not None
    return MlpWeights(gate=mlp.gate[neurons], up=mlp.up[neurons], down=mlp.down[:, neurons] * np.float32(times))


def _write(folder: pathlib.Path, part: int, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str) -> dict[str, str]:
    """Writes one file. -> its name, by tensor."""
    name = f"model-{part + 1:05}-of-{config.num_layers + 1:05}.safetensors"
    stored = TARGET_DTYPES[dtype]
    outputs = [
        Output(key, stored, value.shape, lambda value=value: np.asarray(value).astype(stored)) for key, value in tensors.items()
    ]
    write_safetensors(folder / name, outputs, {"format": "pt"})
    return dict.fromkeys(tensors, name)


def _perplexity_of_written(folder: pathlib.Path, dtype: str, measured: np.ndarray) -> float:
    model = load_model(str(folder), dtype=dtype)
    return perplexity(np.asarray(token_losses(model.logits(batch), jnp.asarray(batch))) for batch in _batches(measured))


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    return [tokens[start : start + SEQUENCES] for start in range(0, len(tokens), SEQUENCES)]
