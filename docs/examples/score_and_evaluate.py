"""What a model thinks of given texts: scores, perplexity, log-probabilities beside generated tokens, and harness tasks.

    python docs/examples/score_and_evaluate.py [CHECKPOINT]

The last part needs lm-evaluation-harness: pip install specmoe_jax[eval]. Without it the rest is shown.
"""

import importlib.util
import math
import pathlib
import sys
import tempfile

from tasks import write_tasks

import specmoe_jax as sm
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.evaluation import harness_model, perplexity, run_tasks


def main(name: str = "demo") -> None:
    model = sm.load_model(name)
    engine = sm.Engine(model, sm.PRESETS["streaming"](model.config).replace(batch_size=8))
    text = (checkpoint_path("demo") / "held_out.txt").read_text(encoding="utf-8")

    # Continuations of one context share it; all texts of a call share each layer's crossing of the link.
    context = "The captain looked at the"
    for ending, score in zip(endings := (" sea.", " ship.", " xyzzy."), engine.score([(context, e) for e in endings]), strict=True):
        print(f"{context}{ending}  log-probability {score.sum:.2f}, of {len(score.token_ids)} tokens, greedy: {score.is_greedy}")

    found = perplexity(engine, text[:4000], window=256, overlap=64)
    print(f"perplexity {found.per_token:.2f} per token, {found.bits_per_byte:.3f} bits per byte, {found.tokens} tokens")

    params = sm.SamplingParams(max_new_tokens=6, logprobs=2, repetition_penalty=1.2)
    (completion,) = engine.generate(["Call me Ishmael."], params)
    for token in completion.logprobs or ():
        best = ", ".join(f"{model.tokenizer.decode([other])!r} {math.exp(logprob):.3f}" for other, logprob in token.top)
        print(f"{model.tokenizer.decode([token.token_id])!r} has probability {math.exp(token.logprob):.3f}; the best are {best}")

    if importlib.util.find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed, so no tasks")
        return
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(pathlib.Path(folder), text, count=4)
        results = run_tasks(harness_model(engine, progress="none"), tasks, bootstrap_iters=0)
    for task, metrics in results["results"].items():
        print(task, {metric: value for metric, value in metrics.items() if isinstance(value, float)})


if __name__ == "__main__":
    main(*sys.argv[1:])
