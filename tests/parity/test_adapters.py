"""Adapters against PEFT: the logits of merge_and_unload, attention, routers and experts."""

import numpy as np
import pytest

from specmoe_jax.checkpoints import load_model
from specmoe_jax.testing.families import RAW_CONFIGS

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
torch.set_num_threads(1)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "mixtral": {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"], "use_rslora": True},
    "gpt_oss": {"target_modules": ["k_proj", "v_proj"], "target_parameters": EXPERTS},
    "deepseek_v3": {"target_modules": ["kv_b_proj", "q_a_proj"], "target_parameters": EXPERTS, "rank_pattern": {"q_a_proj": 2}},
}


@pytest.mark.every_case
@pytest.mark.parametrize("family", CASES)
def test_logits_of_the_merged_model(family, tmp_path):
    torch.manual_seed(1)
    raw = {key: value for key, value in RAW_CONFIGS[family].items() if key != "architectures"}
    base = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**raw), attn_implementation="eager"
    ).eval()
    base.save_pretrained(tmp_path / "model", safe_serialization=True)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, **CASES[family]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()
    model, plain = load_model(str(tmp_path / "model"), adapter=tmp_path / "adapter"), load_model(str(tmp_path / "model"))
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        theirs = merged(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    ours = np.asarray(model.logits(tokens))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(plain.logits(tokens)) - theirs).max() > 1e-2
