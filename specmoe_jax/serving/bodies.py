"""A request's body and its key, checked before anything of it is understood."""

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from specmoe_jax.serving.errors import ApiError

BODY_S = 30.0  # in which a body has to arrive


def check_key(request: Request, api_key: str | None) -> None:
    """Raises ApiError without the key of the server, where it has one."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        said = "the API key is missing or wrong; give it as Authorization: Bearer KEY"
        raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_json(request: Request, most_bytes: int) -> Any:
    """A JSON body of at most so many bytes. Raises ApiError.

    The content type is asked for, because a page of another site may send a text without asking the browser's user, and no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:60]!r}; give application/json")
    if int(request.headers.get("content-length") or 0) > most_bytes:
        raise _too_large(most_bytes)
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request, most_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away while it sent the body") from None
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON ({str(e)[:100]})", code="invalid_json") from None


async def _read(request: Request, most_bytes: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            raise _too_large(most_bytes)
    return bytes(body)


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"the body has more than {most_bytes} bytes, the most that is read", headers={"Connection": "close"})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
