"""Records which experts each pass needs, and replays the trace under every cache policy: no model is needed for the second part.

python docs/examples/routing_traces.py            (writes routing.npy, which `specmoe explain --simulate --trace` reads too)
"""

import numpy as np

import specmoe_jax as sm
from specmoe_jax.planner.replay import replay

PROMPTS = ["Call me Ishmael.", "The sea was calm that night,", "It is a truth universally acknowledged"]


def record(model, prompts, new_tokens):
    """The routing of plain decoding as counts [passes, layers, experts]."""
    trace = []

    def on_step(info):  # routing: [L, B, T, A], -1 at positions without a token
        trace.append([np.bincount(ids[ids >= 0], minlength=model.config.num_experts) for ids in info.verify.routing])

    engine = sm.Engine(model, sm.PRESETS["on_demand"](model.config).replace(batch_size=len(prompts)))
    engine.generate(prompts, sm.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True), on_step=on_step)
    return np.array(trace)


def main(model, prompts=PROMPTS, new_tokens=64, file="routing.npy", shares=(0.25, 0.5)):
    """-> {share of the experts that fit: {policy: fetches over those of the optimum}}"""
    np.save(file, record(model, prompts, new_tokens))
    trace = np.load(file)
    found = {}
    for share in shares:
        fetched = replay(trace, capacity=int(share * trace.shape[1] * trace.shape[2]))
        found[share] = {name: count / max(fetched["belady"], 1) for name, count in fetched.items() if name != "needed"}
    return found


if __name__ == "__main__":
    for share, policies in main(sm.load_model("demo")).items():
        print(f"room for {share:.0%} of the experts; fetches over those of the optimum (belady):")
        print("  " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in sorted(policies.items(), key=lambda entry: entry[1])))
