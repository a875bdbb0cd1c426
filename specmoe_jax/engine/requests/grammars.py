"""Which tokens a JSON schema or a regular expression allows next: masks over the vocabulary, computed on the host by llguidance.

Verification masks every drafted position by the grammar after the tokens before it, so what is committed is a function of the
committed tokens alone. What follows a drafted token that the grammar does not allow is never accepted, and stays unmasked.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.support.errors import RequestError
from specmoe_jax.types import Proposal

EVERYTHING = np.int32(-1)  # 32 tokens that are all allowed
_NEEDS_LIBRARY = '{} needs the library llguidance: pip install "specmoe_jax[structured]"'


class Grammar:
    """What one answer may be. A function of tokens; where its parser stands is remembered, since calls mostly go on from the last.

    error: what the parser could not do, "" while all is well.
    """

    def __init__(self, compiled: Any, vocab_size: int):
        self.error = ""
        self._compiled, self._words = compiled, -(-vocab_size // 32)
        self._matcher: Any = None
        self._read: tuple[int, ...] = ()

    def allowed(self, answer: tuple[int, ...]) -> np.ndarray | None:
        """[W] int32, a bit for each token that may follow these; None where they are not allowed, or the answer has ended.

        No bit is set where the parser fails (a grammar beyond its limits).
        """
        matcher = self._moved(answer)
        if matcher is None:
            return None
        mask = np.zeros(self._words, np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            self.error, self._matcher = matcher.get_error().split("\n")[0], None
            return np.zeros_like(mask)
        return mask

    def forget(self) -> None:
        """Frees the parser of an answer that has ended."""
        self._matcher, self._read = None, ()

    def _moved(self, answer: tuple[int, ...]) -> Any:
        """The parser after these tokens; None if it cannot stand there, or the answer has ended."""
        if self._matcher is None:
            self._matcher, self._read = self._compiled.deep_copy(), ()
        matcher = self._matcher
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._read, answer, strict=False)))
        matcher.rollback(len(self._read) - common)
        taken = matcher.try_consume_tokens(list(answer[common:]))
        self._read = answer[: common + taken]
        return matcher if len(self._read) == len(answer) and matcher.stop_reason() != "EndOfSentence" else None


def make_grammar(index: int, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...], params: SamplingParams) -> Grammar | None:
    """Of request number `index`, None where it asks for none. end_ids: of the model. Raises RequestError."""
    if params.grammar is None:
        return None
    field, text = params.grammar
    if not isinstance(tokenizer, Tokenizer):
        raise RequestError(
            f"prompt {index}: {field} needs a tokenizer of the tokenizers library, and the model has none; leave it out"
        )
    ends = tuple(token for token in end_ids if token < tokenizer.vocab_size)
    if not ends:
        raise RequestError(f"prompt {index}: {field} needs an end-of-sequence token, and the model has none; leave it out")
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(f"prompt {index}: {_NEEDS_LIBRARY.format(field)}")
    try:
        library_tokenizer = _library_tokenizer(tokenizer.backend, vocab_size, ends)
    except ValueError as e:
        said = f"prompt {index}: {field} cannot be used with this tokenizer, which llguidance does not read"
        raise RequestError(f"{said} ({str(e)[:120]}); leave it out") from None
    try:
        return Grammar(_compiled(field, text, library_tokenizer), vocab_size)
    except ValueError as e:
        raise RequestError(f"prompt {index}: {field} cannot be used ({e}); write it as docs/structured.md says") from None


@functools.lru_cache(maxsize=4)
def _library_tokenizer(backend: tokenizers.Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> Any:
    """The tokenizer as the library knows it; ids beyond it, as a padded vocabulary has, are never allowed. Takes a second or so."""
    import llguidance

    known = backend.get_vocab_size(with_added_tokens=True)
    return llguidance.LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, known), eos_token=list(end_ids))


@functools.lru_cache(maxsize=64)
def _compiled(field: str, text: str, tokenizer: Any) -> Any:
    """A parser that has read nothing. Raises ValueError with the library's reason."""
    from llguidance import LLMatcher

    source = {"json_schema": LLMatcher.grammar_from_json_schema, "regex": LLMatcher.grammar_from_regex}[field]
    matcher = LLMatcher(tokenizer, source(text), log_level=0)
    if matcher.is_error():
        lines = [line.strip() for line in matcher.get_error().splitlines()]
        raise ValueError(next((line[7:] for line in lines if line.startswith("error: ")), lines[0])[:200])
    return matcher


Rows = Sequence[tuple[Grammar, tuple[int, ...]] | None]  # of each row of the batch its grammar and its answer so far


def draft_masks(rows: Rows, vocab_size: int) -> Callable[[int, Any], np.ndarray]:
    """(position, drafted [B, N]) -> masks [B, 1, W] of the drafted token at a position, given those before it."""

    def masks(position: int, drafted) -> np.ndarray:
        found, tokens = _all_allowed(len(rows), 1, vocab_size), np.asarray(drafted)[:, :position]
        for row, own in enumerate(rows):
            if own is not None and (mask := own[0].allowed((*own[1], *tokens[row].tolist()))) is not None:
                found[row, 0] = mask
        return found

    return masks


def pass_masks(rows: Rows, proposal: Proposal, vocab_size: int) -> np.ndarray:
    """[B, T, W]: what may follow each position of a pass, along a chain or down the branches of a tree."""
    tokens = np.asarray(proposal.tokens)
    found = _all_allowed(len(rows), tokens.shape[1] + 1, vocab_size)
    parents = None if proposal.tree is None else np.asarray(proposal.tree.parents)
    for row, own in enumerate(rows):
        if own is None:
            continue
        grammar, answer = own
        paths: list[tuple[int, ...] | None] = []  # of each position, None where the grammar does not allow it
        for node in range(tokens.shape[1] + 1):
            parent = node - 1 if parents is None else int(parents[row, node])
            above = answer if node == 0 else paths[parent]
            cut = node > 0 and tokens[row, node - 1] < 0  # its draft ended before
            path = None if cut else above if node == 0 or above is None else (*above, int(tokens[row, node - 1]))
            mask = None if path is None else grammar.allowed(path)
            paths.append(None if mask is None else path)
            if mask is not None:
                found[row, node] = mask
    return found


def _all_allowed(rows: int, positions: int, vocab_size: int) -> np.ndarray:
    return np.full((rows, positions, -(-vocab_size // 32)), EVERYTHING)
