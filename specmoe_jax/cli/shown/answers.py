"""Answers on the terminal: piece by piece, or whole."""

from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.support.progress import beside_bars


def print_piece(event: TokenEvent, shown: IncrementalText, several: bool) -> None:
    """Prints the text of one event; with several prompts, one line each with the number of the prompt."""
    text = shown.push(event)
    print(f"[{event.id}] {text!r}" if several else text, end="\n" if several or event.completion else "", flush=True)


def print_completions(completions: list[Completion], *, apart: bool) -> None:
    """The texts, in the order of the prompts. apart: the answers on lines of their own."""
    with beside_bars():
        for completion in sorted(completions, key=lambda completion: completion.id):
            between = "\n" if apart else ""
            print(f"[{completion.id}] {completion.prompt}{between}{completion.text}\n")
