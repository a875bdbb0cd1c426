"""What the engine's tests share: ragged prompts, ways to run them, and drafts that follow a script."""

import numpy as np

import specmoe_jax as sm
from specmoe_jax.testing import TINY
from specmoe_jax.types import Proposal

PROMPT_LENGTHS = (1, 5, 17, 3, 30, 2, 9, 8)  # ragged, one of a single token
PROMPTS = tuple(tuple(int(t) for t in np.random.default_rng([7, i]).integers(0, 256, n)) for i, n in enumerate(PROMPT_LENGTHS))
GREEDY = sm.SamplingParams(max_new_tokens=16, ignore_eos=True)
SAMPLED = sm.SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.9, top_p=0.95, seed=3)


def plan(preset="specmoe", **changes):
    return sm.PRESETS[preset](TINY).replace(**changes)


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def run(model, a_plan, prompts=PROMPTS, params=GREEDY, **options):
    """Tokens of each prompt, and the figures."""
    engine = sm.Engine(model, a_plan, **options)
    return tokens_of(engine.generate(prompts, params)), engine.stats()


def steps(engine, prompts=PROMPTS, params=GREEDY):
    """The functional face to the end: yields (state before, state after's host part, info). Buffers are donated."""
    state = engine.init(prompts, params)
    while not state.done:
        residency = state.memory.residency
        state, info = engine.step(state)
        yield residency, state, info


class ScriptedDraft:
    """Proposes the target's own next tokens, known beforehand, but a wrong one at position `right(row, start)`.

    texts: prompt -> the tokens that the target will generate. right: row and number of tokens so far -> how many
    drafted tokens are right before the first wrong one.
    """

    def __init__(self, length, texts, right):
        self.length, self._texts, self._right = length, texts, right

    def propose(self, view):
        tokens = np.zeros((len(view.history), self.length), np.int32)
        for row, history in enumerate(view.history):
            if not view.active[row]:
                continue
            prompt = max((p for p in self._texts if history[: len(p)] == p), key=len)
            start = len(history) - len(prompt)
            upcoming = (self._texts[prompt] + (0,) * self.length)[start : start + self.length]
            tokens[row] = upcoming
            wrong = self._right(row, start)
            tokens[row, wrong:] = (tokens[row, wrong:] + 1) % TINY.vocab_size
        return Proposal(tokens=tokens, probs=None), view.kv
