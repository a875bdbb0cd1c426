"""The routes of the server, over one running engine."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from specmoe_jax.checkpoints.chat import FIXED, encode_chat
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.grammars import make_grammar
from specmoe_jax.serving.answers import Choice, Envelope, usage_of
from specmoe_jax.serving.bodies import check_key, read_json
from specmoe_jax.serving.errors import ApiError, error_body
from specmoe_jax.serving.fields import CHAT, TEXT, Ask, check_text, read_ask, sampling_params
from specmoe_jax.serving.runner import Answering, Runner
from specmoe_jax.support.errors import CheckpointError, QueueFull, RequestError

PAGE = pathlib.Path(__file__).parent / "page" / "index.html"
ALIVE_S = 15.0  # between two signs of life of a stream that waits


@dataclasses.dataclass(frozen=True)
class Settings:
    """name: of the model. api_key: None for none. defaults: of sampling, which the model asks for. most_answers: to one request.

    hosts: names under which the server may be asked for, None for any; against pages of other sites that point a name of theirs
    at this machine.
    """

    name: str
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    most_answers: int = 64
    hosts: tuple[str, ...] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Api:
    """The endpoints. runner: steps the service of the engine."""

    def __init__(self, engine: Engine, runner: Runner, settings: Settings):
        self._engine, self._runner, self._settings, self._begun_s = engine, runner, settings, int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, CHAT)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, TEXT)

    async def models(self, request: Request) -> Response:
        check_key(request, self._settings.api_key)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_key(request, self._settings.api_key)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        running, broken = self._runner.service.running, self._runner.broken
        told = {"status": "ok" if broken is None else "broken", "running": running.requests, "waiting": running.waiting}
        return JSONResponse(told if broken is None else told | {"error": broken}, status_code=200 if broken is None else 503)

    async def metrics(self, request: Request) -> Response:
        check_key(request, self._settings.api_key)
        running = self._runner.service.running
        figures = await run_in_threadpool(self._engine.stats)
        text = self._runner.figures.text(figures, running=running.requests, waiting=running.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})

    async def _answer(self, request: Request, form: str) -> Response:
        check_key(request, self._settings.api_key)
        ask = read_ask(form, await read_json(request, self._settings.max_body_bytes))
        if ask.model is not None:
            self._check_model(ask.model)
        prompts, params = await run_in_threadpool(self._prepared, ask)
        each = [prompt for prompt in prompts for _ in range(ask.count)]
        try:
            loop = asyncio.get_running_loop()
            answers = self._runner.submit(each, params, range(len(each)), loop)
        except QueueFull as e:
            raise ApiError(429, str(e), code="queue_full", headers={"Retry-After": str(self._runner.retry_after_s())}) from None
        except RequestError as e:
            raise ApiError(400, str(e).removeprefix("prompt 0: "), code="invalid_request") from None
        choices = [Choice(self._engine.model, ask, index, prompt) for index, prompt in enumerate(each)]
        envelope = Envelope(ask, self._settings.name)
        if ask.stream:
            return EventStream(answers, _chunks(ask, envelope, prompts, choices, answers))
        return await _whole(request, envelope, prompts, choices, answers)

    def _prepared(self, ask: Ask) -> tuple[list[tuple[int, ...]], SamplingParams]:
        """Token ids of each prompt, and the parameters of all."""
        prompts = [self._conversation(ask)] if ask.form == CHAT else [self._ids(prompt) for prompt in ask.prompts]
        if len(prompts) * ask.count > self._settings.most_answers:
            said = f"{len(prompts)} prompts with n={ask.count} are more than {self._settings.most_answers} answers, the most"
            raise ApiError(400, f"{said} that one request may have", param="n")
        room = self._runner.service.max_tokens - max(map(len, prompts))
        if room < 1 or (ask.max_tokens is not None and ask.max_tokens > room):
            most, longest = self._runner.service.max_tokens, max(map(len, prompts))
            asked = "" if ask.max_tokens is None else f" and max_tokens is {ask.max_tokens}"
            said = f"the prompt has {longest} tokens{asked}; prompt and answer together may have {most}"
            raise ApiError(400, said, param="messages" if ask.form == CHAT else "prompt", code="context_length_exceeded")
        params = sampling_params(ask, self._settings.defaults, ask.max_tokens or room)
        self._check_grammar(params)
        return prompts, params

    def _check_grammar(self, params: SamplingParams) -> None:
        """Compiles it here, which may take a second, and not where all requests wait."""
        model = self._engine.model
        try:
            make_grammar(0, model.tokenizer, model.config.vocab_size, model.config.eos_token_ids, params)
        except RequestError as e:
            param = "regex" if params.regex is not None else "response_format"
            raise ApiError(400, str(e).removeprefix("prompt 0: "), param=param, code="invalid_value") from None

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        return tuple(self._engine.model.tokenizer.encode(check_text(prompt, "prompt")))

    def _conversation(self, ask: Ask) -> tuple[int, ...]:
        model = self._engine.model
        check_text(json.dumps(ask.messages, ensure_ascii=False), "messages")
        if taken := sorted(set(ask.template) & set(FIXED)):
            raise ApiError(400, f"chat_template_kwargs holds {taken[0]}, which is no option", param="chat_template_kwargs")
        assert model.path is not None and model.tokenizer is not None  # the command has checked it
        try:
            return tuple(encode_chat(model.path, model.tokenizer, ask.messages, **ask.template))
        except (RequestError, CheckpointError) as e:
            raise ApiError(400, str(e), param="messages", code="chat_template") from None

    def _check_model(self, name: str) -> None:
        if name != self._settings.name:
            said = f"the model {name!r} is not served here; {self._settings.name!r} is"
            raise ApiError(404, said, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        told = {"object": "model", "created": self._begun_s, "owned_by": "specmoe_jax"}
        return {"id": self._settings.name} | told | {"max_model_len": self._runner.service.max_tokens}


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends it, the requests behind it end as well."""

    def __init__(self, answers: list[Answering], events: AsyncIterator[bytes]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.cancel()


async def _chunks(
    ask: Ask, envelope: Envelope, prompts: list[tuple[int, ...]], choices: list[Choice], answers: list[Answering]
) -> AsyncIterator[bytes]:
    for choice in choices:
        if first := envelope.first(choice.index):
            yield _sse(first)
    async for index, event in _merged(answers):
        if event is None:
            yield b": waiting\n\n"
            continue
        if event.completion is not None and event.completion.finish_reason in ("error", "cancelled"):
            yield _sse(_failure(event).body)
            return
        if told := choices[index].push(event):
            yield _sse(envelope.chunk([told]))
    if ask.usage:
        yield _sse(envelope.chunk([], usage_of(prompts, [choice.completion for choice in choices])))
    yield b"data: [DONE]\n\n"


async def _merged(answers: list[Answering]) -> AsyncIterator[tuple[int, TokenEvent | None]]:
    """The events of all answers as they come, with the answer's number; None where nothing came for a while."""
    waits = {asyncio.ensure_future(answer.events.get()): index for index, answer in enumerate(answers)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, timeout=ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield 0, None
            for task in done:
                index, event = waits.pop(task), task.result()
                if event.completion is None:
                    waits[asyncio.ensure_future(answers[index].events.get())] = index
                yield index, event
    finally:
        for task in waits:
            task.cancel()


async def _whole(
    request: Request, envelope: Envelope, prompts: list[tuple[int, ...]], choices: list[Choice], answers: list[Answering]
) -> Response:
    """The answer when it is complete; nothing where the client went away meanwhile."""

    async def gather() -> list[list[TokenEvent]]:
        events: list[list[TokenEvent]] = [[] for _ in answers]
        async for index, event in _merged(answers):
            if event is not None:
                events[index].append(event)
        return events

    ready, gone = asyncio.ensure_future(gather()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((ready, gone), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            return Response(status_code=499)  # nobody reads it
        events = ready.result()
    finally:
        for answer in answers:
            answer.cancel()
        for task in (ready, gone):
            task.cancel()
    for own in events:
        if own[-1].completion is not None and own[-1].completion.finish_reason in ("error", "cancelled"):
            raise _failure(own[-1])
    told = [choice.whole(own) for choice, own in zip(choices, events, strict=True)]
    return JSONResponse(envelope.whole(told, usage_of(prompts, [own[-1].completion for own in events])))


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(event: TokenEvent) -> ApiError:
    completion = event.completion
    assert completion is not None
    if completion.finish_reason == "cancelled":
        return ApiError(503, "the server is being stopped")
    return ApiError(500, completion.error or "the request failed")


def _sse(told: dict) -> bytes:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n".encode()


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    said = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} has no {request.method}"}
    body = error_body(error.status_code, said.get(error.status_code, error.detail))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _own_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed; its log says how"), status_code=500)


def make_app(engine: Engine, runner: Runner, settings: Settings) -> Starlette:
    """The application. Its life is the runner's: started with it, stopped with it."""
    api = Api(engine, runner, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        runner.start()
        yield
        await run_in_threadpool(runner.stop)

    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]
    hosts = [] if settings.hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _own_error}
    return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers, lifespan=lifespan)
