"""The bundled model as transformers reads it: logits, the layer for further tokens, tokenizer."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.chat import encode_chat
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.checkpoints.mtp import load_mtp
from specmoe_jax.checkpoints.tokenizer import load_tokenizer
from specmoe_jax.models import mtp
from specmoe_jax.types import KVCache

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
torch.set_num_threads(1)

FOLDER, TOLERANCE = BUNDLED["demo"], 1e-4


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


def test_logits(model, reference):
    token_ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(token_ids), use_cache=False).logits.numpy()
    ours = np.asarray(model.logits(token_ids))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_the_layer_for_further_tokens(model, reference, monkeypatch):
    layers, caches = pytest.importorskip("transformers.modeling_layers"), pytest.importorskip("transformers.cache_utils")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    # It knows the depths of the published models alone, 46 and 92.
    last = rf"model\.layers\.{model.config.num_layers}\."
    monkeypatch.setattr(reference, "_keys_to_ignore_on_load_unexpected", [last])
    theirs = layers.MtpModel.from_pretrained(reference, device_map={"": "cpu"}).eval()
    token_ids, length = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 12)), 11
    ids = torch.from_numpy(token_ids)
    with torch.no_grad():
        states = reference.model(ids, use_cache=False).last_hidden_state[:, :-1]
        where = {"attention_mask": None, "position_ids": torch.arange(1, 12)[None]}
        cache = caches.MtpCache(config=reference.config.get_mtp_config())
        wanted = theirs(ids[:, 1:], states, mtp_cache=cache, **where)[1][:, 0].numpy()
    head = load_mtp(model)
    attention = head.config.attention
    zeros = jnp.zeros((1, attention.num_kv_heads, length, attention.cache_dim))
    kv, rows = KVCache(k=(zeros,), v=(zeros,)), jnp.zeros(1, jnp.int32)
    tokens = jnp.asarray(token_ids[:, 1:], jnp.int32)
    ours, _ = mtp.forward(head, tokens, jnp.asarray(states.numpy()), kv, rows, jnp.array([0]), jnp.array([length]))
    np.testing.assert_allclose(mtp.logits(head, ours[:, -1]), wanted, rtol=0, atol=TOLERANCE)


def test_tokenizer():
    reference = transformers.AutoTokenizer.from_pretrained(FOLDER)
    tokenizer = load_model("demo").tokenizer
    for text in ("Call me Ishmael.", "  two  spaces\n\tand a tab", "naïve café 😀 日本語"):
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


TEMPLATE = """{{ bos_token }}{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + m['content'] + ' [/INST]' }}
    {%- else %}
        {{- m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}{% if add_generation_prompt %} {{ messages | tojson }}{% endif %}"""


def test_chat_template_with_the_tokenizer(tmp_path):
    pytest.importorskip("jinja2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    messages = [
        {"role": "user", "content": "Is <this> 日本?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why"},
    ]
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_chat(tmp_path, load_tokenizer(tmp_path, ()), messages) == expected["input_ids"]
