"""Tokens scored per second: texts of one length through some presets, beside the generation of texts as long and transformers.

    python -m specmoe_jax.benchmarks.studies.steps.measure_scoring --texts=256 --tokens=64

One JSON line each: of reading every text once (score), of generating as long texts (generate), and of transformers' forward in
batches of 8 where it is installed. The first call of each is not timed.
"""

import argparse
import importlib.util
import json
import time

import numpy as np

import specmoe_jax as sm
from specmoe_jax.checkpoints.loader import checkpoint_path

PRESETS = ("resident", "on_demand", "streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--presets", default=",".join(PRESETS), help="that score; the last one generates too")
    parser.add_argument("--generated", type=int, help="texts that are generated (default: as many as are scored)")
    options = parser.parse_args()
    model = sm.load_model(options.model)
    text = (checkpoint_path("demo") / "held_out.txt").read_text(encoding="utf-8")
    ids = np.resize(model.tokenizer.encode(text), (options.texts, options.tokens))
    ids[:, 1] = np.arange(options.texts) % model.config.vocab_size  # no two alike: nothing is shared
    pairs = [(tuple(row[:1].tolist()), tuple(row[1:].tolist())) for row in ids]
    names = options.presets.split(",")
    for name in names:
        engine = sm.Engine(model, sm.PRESETS[name](model.config).replace(batch_size=options.batch_size))
        engine.score(pairs)
        before, start = engine.stats()["score_link_bytes"], time.perf_counter()
        engine.score(pairs)
        tell("score", name, options, time.perf_counter() - start, link_bytes=engine.stats()["score_link_bytes"] - before)
    prompts = [context for context, _ in pairs[: options.generated]]
    params = sm.SamplingParams(max_new_tokens=options.tokens - 1, ignore_eos=True)
    engine.generate(prompts[: options.batch_size], params)
    start = time.perf_counter()
    engine.generate(prompts, params)
    tell("generate", names[-1], options, time.perf_counter() - start, texts=len(prompts))
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        reference(options, ids)


def reference(options, ids: np.ndarray) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(checkpoint_path(options.model)), dtype=torch.float32).eval()

    def score(rows: np.ndarray) -> None:
        tokens = torch.from_numpy(rows.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[:, :-1], use_cache=False).logits, -1)
        logprobs.gather(-1, tokens[:, 1:, None])

    score(ids[:8])
    start = time.perf_counter()
    for first in range(0, len(ids), 8):
        score(ids[first : first + 8])
    tell("score", "transformers", options, time.perf_counter() - start)


def tell(what: str, how: str, options, seconds: float, *, texts: int | None = None, **more) -> None:
    tokens = (texts or options.texts) * (options.tokens - 1)
    print(json.dumps({"what": what, "how": how, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds} | more))


if __name__ == "__main__":
    main()
