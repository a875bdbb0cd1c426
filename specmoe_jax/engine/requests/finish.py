"""When a request ends: the rules, as a pure function of its tokens."""

from specmoe_jax.checkpoints.tokenizer import text_after
from specmoe_jax.engine.state import Request


def commit_tokens(
    request: Request, generated: tuple[int, ...], run: tuple[int, ...], eos_token_ids: tuple[int, ...], tokenizer
) -> tuple[tuple[int, ...], str | None]:
    """`generated` plus as much of `run` as the request still takes, and the finish reason or None.

    "stop": an end-of-sequence token, a stop string that is a token of its own, or the text now contains a stop string; the token
    that did it is kept. "length": the limit is reached. What an accepted run holds beyond is dropped.
    """
    for token in run:
        generated = (*generated, token)
        if (token in eos_token_ids and not request.params.ignore_eos) or token in request.stop_ids:
            return generated, "stop"
        if request.params.stop and ends_in_stop(tokenizer, generated, request.params.stop, request.token_ids):
            return generated, "stop"
        if len(generated) >= request.limit:
            return generated, "length"
    return generated, None


def final_text(
    generated: tuple[int, ...], stop: tuple[str, ...], end_ids: tuple[int, ...], tokenizer, prompt: tuple[int, ...] = ()
) -> str:
    """The text of a finished request: without the token that ended it, cut before the first stop string.

    end_ids: end-of-sequence tokens, and stop strings that are tokens. prompt: what the text goes on from.
    """
    kept = generated[:-1] if generated and generated[-1] in end_ids else generated
    text = text_after(tokenizer, prompt, kept)
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def safe_length(text: str, stop: tuple[str, ...]) -> int:
    """How much of a text that is still growing can be shown: what may begin a stop string cannot.

    >>> safe_length("the en", stop=("end", "stop"))
    4
    """
    held = max((n for string in stop for n in range(1, min(len(string), len(text) + 1)) if text.endswith(string[:n])), default=0)
    return len(text) - held


def ends_in_stop(tokenizer, generated: tuple[int, ...], stop: tuple[str, ...], prompt: tuple[int, ...] = ()) -> bool:
    """Whether the text holds a stop string, given that it did not before its last token.

    The work does not grow with the text: a new stop string reaches at most its own length into what was there, so the end
    of the text is decoded, and the whole of it only to confirm. A cut inside a character of up to four byte tokens spoils
    what follows for some decoders, so the end is cut at four places in a row.
    """
    reach = 4 * max(map(len, stop)) + 8  # a character may take four byte tokens, each of which may decode to one of its own
    size = reach + 4
    while size + 3 < len(generated):
        if len(tokenizer.decode(generated[-size:-1])) >= reach:  # else tokens without text are among them
            ends = (tokenizer.decode(generated[-size - shift :]) for shift in range(4))
            return any(_has_stop(end, stop) for end in ends) and _has_stop(text_after(tokenizer, prompt, generated), stop)
        size *= 2
    return _has_stop(text_after(tokenizer, prompt, generated), stop)


def _has_stop(text: str, stop: tuple[str, ...]) -> bool:
    return any(string in text for string in stop)
