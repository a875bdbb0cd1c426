"""Speed of the resident preset against transformers' generate on the bundled model; not collected by pytest.

    python -m specmoe_jax.benchmarks.studies.measure_generate
Interleaved rounds in one process, float32, greedy, 32 prompt tokens and 64 new ones; the median of the paired ratios.
"""

import pathlib
import time
from typing import Any

import numpy as np
import torch
import transformers

import specmoe_jax as sm

DEMO = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo"
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 5


def prompts(model: sm.Model, count: int) -> list[list[int]]:
    lines = (DEMO / "held_out.txt").read_text(encoding="utf-8").splitlines()
    tokens = [model.tokenizer.encode(line)[:PROMPT_TOKENS] for line in lines if line.strip()]
    return [ids for ids in tokens if len(ids) == PROMPT_TOKENS][:count]


def seconds(function) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = function()
    return time.perf_counter() - start, tokens


def _reference() -> Any:
    """transformers' model; its own types do not know its `generate`."""
    return transformers.MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def main() -> None:
    model = sm.load_model("demo")
    reference = _reference()
    params = sm.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for batch in (1, 8):
        texts = prompts(model, batch)
        engine = sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=batch))
        ids = torch.tensor(texts)

        def ours(engine=engine, texts=texts):
            return [list(completion.token_ids) for completion in engine.generate(texts, params)]

        def theirs(ids=ids):
            with torch.no_grad():
                out = reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            return out[:, PROMPT_TOKENS:].tolist()

        ours()  # compile and warm up
        theirs()
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
        same = all(a[1] == b[1] for a, b in rounds)
        ratios = sorted(b[0] / a[0] for a, b in rounds)
        speed = batch * NEW_TOKENS / np.median([a[0] for a, _ in rounds])
        spread = f"{np.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
        print(f"batch {batch}: {speed:,.0f} tokens/s, transformers x {spread}, same tokens: {same}")


if __name__ == "__main__":
    main()
