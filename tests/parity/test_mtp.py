"""The layer for further tokens against transformers' MtpModel: logits of k = 1..4 within 1e-4, the same argmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.mtp import load_mtp
from specmoe_jax.models import layers, mtp
from specmoe_jax.testing.families import RAW_CONFIGS
from specmoe_jax.types import KVCache

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
modeling = pytest.importorskip("transformers.modeling_layers", reason=REASON)
if not hasattr(modeling, "MtpModel"):
    pytest.skip("MtpModel came with transformers 5.24: pip install '.[parity]'", allow_module_level=True)
import safetensors.torch  # noqa: E402
import transformers  # noqa: E402
from transformers.cache_utils import MtpCache  # noqa: E402

torch.set_num_threads(1)
TOLERANCE, FURTHER, LENGTH = 1e-4, 4, 11
RENAMED = {"mtp_block.": "", "post_norm.weight": "shared_head.norm.weight"}


def reference(family: str, path, count: int = 1):
    """A random target with its layers; saved as published, the layers after the last one, experts one by one."""
    torch.manual_seed(0)
    raw = {key: value for key, value in RAW_CONFIGS[family].items() if key != "architectures"}
    raw["num_nextn_predict_layers"] = count
    config = transformers.AutoConfig.for_model(**raw, initializer_range=0.15)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(path)
    head = modeling.MtpModel(model, count).eval()
    with torch.no_grad():
        for name, weight in (*head.layers.named_parameters(), *head.layers.named_buffers()):
            normal = 0.15 * torch.randn_like(weight)
            weight.copy_(1 + normal if "norm" in name else normal)
    stored = safetensors.torch.load_file(path / "model.safetensors")
    for index, layer in enumerate(head.layers, config.num_hidden_layers):
        for name, weight in layer.state_dict().items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            stored |= {f"model.layers.{index}.{part}": w.contiguous() for part, w in published(name, weight)}
    safetensors.torch.save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return model, head


def published(name: str, weight):
    """One tensor a matrix where all experts are fused."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return [(name, weight)]
    module, matrix = name.rsplit(".", 1)
    if matrix == "down_proj":
        return [(f"{module}.{e}.down_proj.weight", w) for e, w in enumerate(weight)]
    halves = enumerate(weight.chunk(2, dim=1))
    return [(f"{module}.{e}.{('gate', 'up')[i]}_proj.weight", w) for i, half in halves for e, w in enumerate(half)]


@torch.no_grad()
def their_logits(model, head, token_ids) -> list[np.ndarray]:
    """[V] of each further token: the first by MtpModel itself, the rest by feeding its layer with its own states."""
    states = model.model(token_ids, use_cache=False).last_hidden_state
    tokens = torch.cat([token_ids[:, 1:], model.lm_head(states[:, -1:]).argmax(-1)], dim=1)
    positions, cache, found = torch.arange(1, LENGTH + 1)[None], MtpCache(config=head.config), []
    first = head(
        input_ids=tokens,
        last_hidden_states=states,
        attention_mask=None,
        position_ids=positions,
        mtp_cache=MtpCache(config=head.config),
    )[1]
    for _ in range(FURTHER):
        states = head.forward_layer(0, states, positions, cache, input_ids=tokens)[:, -1:]
        found.append(head.shared_head(states))
        tokens, positions = found[-1].argmax(-1), positions[:, -1:] + 1
    assert torch.equal(found[0], first)
    return [logits[0, 0].numpy() for logits in found]


def our_logits(model, head, token_ids) -> list[np.ndarray]:
    """The same by a pass over the prompt and one row at a time."""
    attention = head.config.attention
    cache = jnp.zeros((1, attention.num_kv_heads, LENGTH + FURTHER, attention.cache_dim))
    kv, rows, found = KVCache(k=(cache,), v=(cache,)), jnp.zeros(1, jnp.int32), []
    states = last_states(model, token_ids)
    nxt = layers.output(head.output, states[:, -1:]).argmax(-1)
    tokens, length = jnp.concatenate([token_ids[:, 1:], nxt], axis=1).astype(jnp.int32), 0
    for _ in range(FURTHER):
        new = tokens.shape[1]
        states, kv = mtp.forward(head, tokens, states, kv, rows, jnp.array([length]), jnp.array([new]))
        states = states[:, -1:]
        found.append(np.asarray(mtp.logits(head, states))[0, 0])
        tokens, length = jnp.array([[found[-1].argmax()]], jnp.int32), length + new
    return found


def last_states(model, token_ids):
    """[1, T, M] after the final norm: logits against the identity."""
    plain = model.weights.replace(lm_head=jnp.eye(model.config.hidden_size))
    return type(model)(config=model.config, weights=plain, experts=model.experts, tokenizer=None, dtype="float32").logits(token_ids)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_logits_of_further_tokens(family, tmp_path):
    theirs = reference(family, tmp_path)
    model = load_model(str(tmp_path))
    head = load_mtp(model)
    for seed in range(3):
        token_ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, LENGTH))
        pairs = zip(our_logits(model, head, token_ids), their_logits(*theirs, torch.from_numpy(token_ids)), strict=True)
        for k, (ours, expected) in enumerate(pairs, 1):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE, err_msg=f"k = {k}")
            assert ours.argmax() == expected.argmax()


def our_logits_of_several(model, head, token_ids) -> list[np.ndarray]:
    """Each layer over all rows, with the states of the one before it and the tokens one further on."""
    states, found = last_states(model, token_ids), []
    nxt = layers.output(head.output, states[:, -1:]).argmax(-1)
    for layer in head.chain:
        token_ids = jnp.concatenate([token_ids[:, 1:], nxt], axis=1).astype(jnp.int32)
        attention = layer.config.attention
        cache = jnp.zeros((1, attention.num_kv_heads, LENGTH, attention.cache_dim))
        where = (KVCache(k=(cache,), v=(cache,)), jnp.zeros(1, jnp.int32), jnp.array([0]), jnp.array([LENGTH]))
        states, _ = mtp.forward(layer, token_ids, states, *where)
        found.append(np.asarray(mtp.logits(layer, states[:, -1]))[0])
        nxt = found[-1].argmax()[None, None]
    return found


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_logits_of_several_layers(family, tmp_path):
    """Three layers, each of which gives one token: what MtpModel itself computes."""
    their_model, their_head = reference(family, tmp_path, 3)
    model = load_model(str(tmp_path))
    head = load_mtp(model)
    token_ids = np.random.default_rng(5).integers(0, model.config.vocab_size, (1, LENGTH))
    with torch.no_grad():
        states = their_model.model(torch.from_numpy(token_ids), use_cache=False).last_hidden_state
        following = torch.cat([torch.from_numpy(token_ids[:, 1:]), their_model.lm_head(states[:, -1:]).argmax(-1)], dim=1)
        _, logits, _ = their_head(
            input_ids=following,
            last_hidden_states=states,
            attention_mask=None,
            position_ids=torch.arange(1, LENGTH + 1)[None],
            mtp_cache=MtpCache(config=their_head.config),
        )
    for ours, theirs in zip(our_logits_of_several(model, head, token_ids), logits[0].numpy(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        assert ours.argmax() == theirs.argmax()
