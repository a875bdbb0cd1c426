"""What the engine's tests share: ragged prompts, ways to run them, and drafts that follow a script."""

import jax
import numpy as np

import specmoe_jax as sm
from specmoe_jax.speculate.trees import make_tree
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


def reference(model, context, continuation, source=None):
    """Log-probabilities by the forward without a cache, and whether all are the argmax. Padded: each shape compiles anew."""
    tokens = np.zeros((1, TINY.max_positions if source is None else 16), np.int32)
    tokens[0, : len(context) + len(continuation)] = (*context, *continuation)
    if source is None:
        logits = np.asarray(model.logits(tokens))[0]
    else:
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(source)] = source
        logits = np.asarray(model.logits(tokens, padded, [len(source)]))[0]
    places = len(context) - 1 + np.arange(len(continuation))
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))[places, continuation]
    return logprobs, (logits[places].argmax(-1) == continuation).all()


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


class ScriptedTree:
    """As ScriptedDraft, but the right tokens are scattered over a random tree among wrong ones.

    The tree has `count` nodes and paths of up to `depth`; right(row, start) of its nodes, one below the other, are right.
    """

    def __init__(self, depth, count, texts, right):
        self._chain, self._depth, self._count, self._right = ScriptedDraft(depth, texts, lambda *_: depth), depth, count, right

    def propose(self, view):
        text = self._chain.propose(view)[0].tokens  # [B, depth], all right
        tokens, parents = np.zeros((2, len(text), self._count), np.int32)
        for row, history in enumerate(view.history):
            rng = np.random.default_rng([row, len(history)])
            right = self._right(row, len(history))
            path, depths = sorted(rng.choice(self._count, right, replace=False).tolist()), [0]
            on_path = [0]  # nodes
            for node in range(1, self._count + 1):
                if node - 1 in path:
                    parents[row, node - 1], tokens[row, node - 1] = on_path[-1], text[row, len(on_path) - 1]
                    on_path.append(node)
                else:
                    parent = rng.choice([n for n in range(node) if depths[n] < self._depth])
                    parents[row, node - 1] = parent
                    tokens[row, node - 1] = (text[row, min(depths[parent], self._depth - 1)] + 1 + node) % TINY.vocab_size
                depths.append(depths[parents[row, node - 1]] + 1)
        return Proposal(tokens=tokens, probs=None, tree=make_tree(parents, self._depth)), view.kv
