"""A server over the tiny model in this process, which tests talk to over a real socket."""

import contextlib
import json
import pathlib
import socket
import threading
import time
from typing import NamedTuple

import httpx
import uvicorn

import specmoe_jax as sm
from specmoe_jax.engine.service.service import Service
from specmoe_jax.serving.app import Settings, make_app
from specmoe_jax.serving.metrics import ServerFigures
from specmoe_jax.serving.runner import Runner
from specmoe_jax.testing import byte_tokenizer, write_tiny

KEY = "a key"
TEMPLATE = (
    "{% for m in messages %}{% if '!' in m.content %}{{ raise_exception('no shouting') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}>"
)


class Served(NamedTuple):
    url: str
    engine: sm.Engine
    service: Service
    runner: Runner

    def post(self, path: str, body, **options) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
        if isinstance(body, dict):
            options["json"] = body
        else:
            options["content"] = body
            headers |= {"Content-Type": "application/json"}
        return httpx.post(self.url + path, headers=headers, timeout=60, **options)


def write_chat_model(folder: pathlib.Path) -> pathlib.Path:
    write_tiny(folder)
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@contextlib.contextmanager
def serving(engine: sm.Engine, *, max_waiting: int | None = None, **settings):
    """A running server."""
    service = engine.service(max_tokens=80, max_waiting=max_waiting)
    runner = Runner(service, ServerFigures())
    service.submit([0], sm.SamplingParams(max_new_tokens=1)).result()
    app = make_app(engine, runner, Settings(name="tiny", api_key=KEY, hosts=("localhost", "127.0.0.1"), **settings))
    own = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{own.getsockname()[1]}", engine, service, runner)
    finally:
        server.should_exit = True
        thread.join()
        own.close()


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
