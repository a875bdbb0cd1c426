"""A policy of one's own for the experts that stay on the accelerator and draft, beside the built-in ones.

python docs/examples/draft_set_policy.py
"""

import specmoe_jax as sm
from specmoe_jax.speculate import DraftSetPolicy

PROMPTS = ["Call me Ishmael.", "The sea was calm that night,", "It is a truth universally acknowledged"]


def fading(weight):
    """Only choices of accepted tokens are remembered, and what is older fades. Experts are ranked by the scores, in each layer.

    memory: [L, E], one row of it in `scores`. counts: how often a pass chose each expert. accepted: the same of committed tokens.
    """
    return DraftSetPolicy(
        scores=lambda memory, counts, layer: weight * memory + counts,
        update=lambda memory, counts, accepted: weight * memory + accepted,
        name=f"accepted choices, fading by {weight}",
    )


def run(model, plan, prompts, new_tokens, policy=None):
    """-> tokens of each prompt, and the figures"""
    engine = sm.Engine(model, plan, draft_set=policy)
    completions = engine.generate(prompts, sm.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    return [completion.token_ids for completion in completions], engine.stats()


def main(model, prompts=PROMPTS, new_tokens=64):
    """-> {name of the policy: (tokens per step, link bytes per token)}; the text is the same under all of them"""
    plan = sm.PRESETS["specmoe"](model.config).replace(batch_size=len(prompts))
    runs = [run(model, plan.replace(draft_set=name), prompts, new_tokens) for name in ("hot_temporal", "hot_global")]
    runs += [run(model, plan, prompts, new_tokens, fading(weight)) for weight in (0.5, 0.9)]
    assert all(tokens == runs[0][0] for tokens, _ in runs), "a policy changes the speed, never the text"
    return {stats["draft_set"]: (stats["tokens_per_step"], stats["link_bytes_per_token"]) for _, stats in runs}


if __name__ == "__main__":
    for name, (tokens, sent) in main(sm.load_model("demo")).items():
        print(f"{name:<36} {tokens:.2f} tokens a step, {sent / 1e6:.2f} MB a token over the link")
