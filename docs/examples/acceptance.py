"""How many drafted tokens are accepted, against the draft experts N and the draft length; a picture of both.

python docs/examples/acceptance.py            (some minutes on two cores; writes acceptance.png)
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import specmoe_jax as sm

PROMPTS = ["Call me Ishmael.", "The sea was calm that night,", "It is a truth universally acknowledged"]


def accepted(model, prompts, new_tokens, **changes):
    """Accepted tokens per step of the self-draft (committed tokens less the target's own one)."""
    plan = sm.PRESETS["specmoe"](model.config).replace(batch_size=len(prompts), deterministic_sampling=True, **changes)
    engine = sm.Engine(model, plan)
    engine.generate(prompts, sm.SamplingParams(max_new_tokens=new_tokens, temperature=0.7, ignore_eos=True))
    return engine.stats()["tokens_per_step"] - 1


def main(model, prompts=PROMPTS, experts=(2, 4, 8), lengths=(1, 2, 4, 8), new_tokens=64, picture="acceptance.png"):
    """-> {N: [accepted tokens at each length]}"""
    found = {n: [accepted(model, prompts, new_tokens, draft_experts=n, draft_length=length) for length in lengths] for n in experts}
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(lengths, lengths, color="0.7", linestyle=":", label="all accepted")
    for n, means in found.items():
        axes.plot(lengths, means, marker="o", label=f"N = {n} of {model.config.num_experts} experts")
    axes.set(xlabel="drafted tokens per step", ylabel="accepted tokens per step", xticks=lengths, ylim=(0, max(lengths)))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    return found


if __name__ == "__main__":
    for n, means in main(sm.load_model("demo")).items():
        print(f"N = {n}: " + "  ".join(f"{mean:.2f}" for mean in means))
