"""Prompt lookup."""

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.speculate.drafts.ngram import NgramDraft, lookup


class NgramExecutor(DraftExecutor):
    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> NgramDraft:
        return NgramDraft()

    def rate_on_text(self, prompt: tuple[int, ...], generated: tuple[int, ...]) -> float:
        guesses = [lookup((*prompt, *generated[:i]), 1, NgramDraft().longest)[0] for i in range(len(generated))]
        return sum(guess == token for guess, token in zip(guesses, generated, strict=True)) / max(len(generated), 1)


DRAFT = NgramExecutor()
