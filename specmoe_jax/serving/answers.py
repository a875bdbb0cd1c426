"""Answers in the form of the OpenAI API: whole ones, chunks of a stream, log-probabilities."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from specmoe_jax.checkpoints.channels import split_channels
from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.models.model import Model
from specmoe_jax.serving.fields import CHAT, Ask
from specmoe_jax.types import TokenLogprob

_IDS = {CHAT: "chatcmpl"}
_OBJECTS = {CHAT: "chat.completion"}


class Choice:
    """One answer while it grows. index: among those of its request."""

    def __init__(self, model: Model, ask: Ask, index: int, prompt: tuple[int, ...]):
        self.index, self.completion = index, None
        self._model, self._ask, self._shown = model, ask, IncrementalText(model, ask.sampling.get("stop", ()), prompt)
        self._text, self._told = "", {"content": 0, "reasoning_content": 0}
        self._logprobs: list[TokenLogprob] = []
        self._offset = 0

    def push(self, event: TokenEvent) -> dict[str, Any] | None:
        """A chunk's choice with what an event adds; None where that is nothing to tell yet."""
        self.completion: Completion | None = event.completion
        piece = self._shown.push(event)
        logprobs = None if event.logprobs is None else self._told_logprobs(event.logprobs, event.completion)
        if not piece and not logprobs and event.completion is None:
            return None
        reason = None if event.completion is None else event.completion.finish_reason
        choice: dict[str, Any] = {"index": self.index, "finish_reason": reason, "logprobs": logprobs}
        self._text += piece
        return choice | ({"delta": self._delta(piece)} if self._ask.form == CHAT else {"text": piece})

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        completion = next(event.completion for event in events if event.completion is not None)
        asked = any(event.logprobs is not None for event in events)
        tokens = [token for event in events for token in event.logprobs or ()]
        logprobs = self._told_logprobs(tokens, completion) if asked else None
        choice: dict[str, Any] = {"index": self.index, "finish_reason": completion.finish_reason, "logprobs": logprobs}
        return choice | ({"message": message(completion)} if self._ask.form == CHAT else {"text": completion.text})

    def _delta(self, piece: str) -> dict[str, str]:
        """Of a model with channels, what each grew by."""
        if "<|channel|>" not in self._text:
            return {"content": piece} if piece else {}
        channels, delta = split_channels(self._text), {}
        for key, name in (("content", "final"), ("reasoning_content", "analysis")):
            whole = channels.get(name, "")
            if new := whole[self._told[key] :]:
                delta[key], self._told[key] = new, len(whole)
        return delta

    def _told_logprobs(self, tokens: Sequence[TokenLogprob], completion: Completion | None) -> dict[str, Any]:
        """Without the token that ended the text, which no text shows."""
        ends = self._model.config.eos_token_ids
        if completion is not None and completion.finish_reason == "stop" and tokens and tokens[-1].token_id in ends:
            tokens = tokens[:-1]
        if self._ask.form == CHAT:
            return {"content": [self._entry(token) for token in tokens], "refusal": None}
        texts = [self._token_text(token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._token_text(token_id): found for token_id, found in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        return self._one(token.token_id, token.logprob) | {"top_logprobs": [self._one(*pair) for pair in token.top]}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it is part of a character, whose bytes are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _token_text(self, token_id: int) -> str:
        return self._model.tokenizer.decode([token_id], skip_special_tokens=False)


def message(completion: Completion) -> dict[str, Any]:
    """The answer; of a model with channels the final one, and what it thought beside it."""
    channels = completion.channels
    told = {"role": "assistant", "content": channels.get("final", "") if channels else completion.text}
    return told | ({"reasoning_content": channels["analysis"]} if "analysis" in channels else {})


class Envelope:
    """What all answers to one request have in common."""

    def __init__(self, ask: Ask, name: str):
        self._ask = ask
        self._fields = {"id": f"{_IDS.get(ask.form, 'cmpl')}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self, choices: list[dict], usage: dict) -> dict:
        return self._fields | {"object": _OBJECTS.get(self._ask.form, "text_completion"), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        kind = "chat.completion.chunk" if self._ask.form == CHAT else "text_completion"
        told = {"usage": usage} if self._ask.usage else {}
        return self._fields | {"object": kind, "choices": choices} | told

    def first(self, index: int) -> dict | None:
        """The chunk with which an answer of a chat begins."""
        if self._ask.form != CHAT:
            return None
        delta = {"role": "assistant", "content": ""}
        return self.chunk([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])


def usage_of(prompts: Sequence[Sequence[int]], completions: Sequence[Completion | None]) -> dict[str, int]:
    """prompts: each counted once, whatever the number of its answers."""
    asked = sum(map(len, prompts))
    made = sum(len(completion.token_ids) for completion in completions if completion is not None)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
