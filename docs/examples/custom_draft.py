"""A draft of one's own: the continuation of the last two tokens wherever they stood before, in any row of the batch.

python docs/examples/custom_draft.py
"""

import numpy as np

import specmoe_jax as sm
from specmoe_jax.types import Proposal

PROMPTS = ["one two three one two three one two", "The sea, the sea, the sea, the"]


class SharedBigrams:
    """What followed a pair of tokens last, learnt from the histories of all rows; it needs no weights and no expert."""

    def propose(self, view):
        followers = {}
        for history in view.history:
            for first, second, following in zip(history, history[1:], history[2:], strict=False):
                followers[first, second] = following
        tokens = np.zeros((len(view.history), view.length), np.int32)
        for row, history in enumerate(view.history):
            pair = tuple(history[-2:]) if len(history) > 1 else (0, 0)
            for position in range(view.length):
                tokens[row, position] = followers.get(pair, pair[1])
                pair = (pair[1], int(tokens[row, position]))
        # probs=None: the tokens were looked up, not drawn. Whatever is proposed, the text is the target's.
        return Proposal(tokens=tokens, probs=None), view.kv


def main(model, prompts=PROMPTS, new_tokens=48, length=4):
    """-> tokens per step with the draft; the tokens are checked against those of plain decoding"""
    params = sm.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    plain = sm.PRESETS["on_demand"](model.config).replace(batch_size=len(prompts))
    expected = [completion.token_ids for completion in sm.Engine(model, plain).generate(prompts, params)]
    engine = sm.Engine(model, plain.replace(draft="custom", draft_length=length), draft=SharedBigrams())
    assert [completion.token_ids for completion in engine.generate(prompts, params)] == expected
    return engine.stats()["tokens_per_step"]


if __name__ == "__main__":
    print(f"{main(sm.load_model('demo')):.2f} tokens per step, the same text as without a draft")
