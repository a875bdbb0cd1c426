"""Prompts and parameters -> requests, or an error that names the prompt. Nothing runs before all are checked."""

from collections.abc import Sequence

from specmoe_jax.config import SamplingParams
from specmoe_jax.engine.state import Request
from specmoe_jax.errors import RequestError
from specmoe_jax.models.model import Model


def make_requests(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Request]:
    """One Request per prompt, ids in order. params: one for all, one each, or None for the defaults."""
    if isinstance(prompts, str):
        raise RequestError("prompts is one text; give a list of texts (or of token-id lists)")
    if not prompts:
        raise RequestError("no prompts were given; give at least one")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(params)} sampling parameters; give one for all or one each")
    return [_request(model, index, prompt, p) for index, (prompt, p) in enumerate(zip(prompts, params, strict=True))]


def _request(model: Model, index: int, prompt: str | Sequence[int], params: SamplingParams) -> Request:
    text = prompt if isinstance(prompt, str) else None
    if (text is not None or params.stop) and model.tokenizer is None:
        raise RequestError(f"prompt {index} needs a tokenizer and the model has none; give token ids and no stop strings")
    token_ids = tuple(model.tokenizer.encode(prompt)) if text is not None else tuple(int(token) for token in prompt)
    window, vocab = model.config.max_positions, model.config.vocab_size
    if not token_ids:
        raise RequestError(f"prompt {index} is empty; give at least one token")
    if not all(0 <= token < vocab for token in token_ids):
        raise RequestError(f"prompt {index} holds a token id outside 0..{vocab - 1}, the model's vocabulary")
    if len(token_ids) >= window:
        raise RequestError(
            f"prompt {index} has {len(token_ids)} tokens and the model's window is {window}, one of them for the "
            f"answer; shorten it to {window - 1}"
        )
    limit = min(params.max_new_tokens, window - len(token_ids))
    return Request(id=index, prompt=text, token_ids=token_ids, params=params, limit=limit)
