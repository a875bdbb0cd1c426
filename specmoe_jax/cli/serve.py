"""Serves a model over the OpenAI API, with a chat page, on this machine alone unless told otherwise.

Example:
    specmoe serve --model=DIR --preset=specmoe --port=8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Call me", "max_tokens": 16}'
A batch job behind the requests of people: --prompts=FILE --output=FILE, as of specmoe generate.
"""

import contextlib
import ipaddress
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

from absl import flags

from specmoe_jax.autotune.choose import Job
from specmoe_jax.checkpoints.published.generation_config import sampling_defaults
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import engine_flags
from specmoe_jax.cli.run_files import check_files
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs.prompts import as_chat, read_prompts
from specmoe_jax.jobs.tables import as_table
from specmoe_jax.support.errors import RequestError, UserError

USUAL = Job(prompt_tokens=256, new_tokens=256)  # of a request, for the planner's choice
REQUESTS = 64
STOP_S = 5  # that open answers get at the end
KEY_VARIABLE = "SPECMOE_API_KEY"

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at. Another than this machine's own needs --api_key.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 for a free one.", lower_bound=0, upper_bound=65535)
_API_KEY = flags.DEFINE_string("api_key", None, f"Key that clients have to give. Default: ${KEY_VARIABLE}, or none.")
_SERVED_NAME = flags.DEFINE_string("served_name", None, "Name of the model for clients. Default: of its directory.")
_MAX_WAITING = flags.DEFINE_integer(
    "max_waiting",
    None,
    "Requests that may wait for a row; more are answered with 429. Default: four times the batch.",
    lower_bound=0,
)
_MAX_BODY_MIB = flags.DEFINE_float("max_body_mib", 4.0, "Size of a request at most.", lower_bound=0.001)
_PROMPTS = flags.DEFINE_string("prompts", None, "A batch job behind the requests: .txt, one prompt a line, or .jsonl.")
_OUTPUT = flags.DEFINE_string("output", None, "Where its finished requests go, as JSON lines; the same command goes on with it.")
_RESTART = flags.DEFINE_boolean("restart", False, "Begin the job of --output anew instead of going on with it.")
flags.adopt_module_key_flags(engine_flags)


def main() -> None:
    key = _API_KEY.value or os.environ.get(KEY_VARIABLE)
    check_flags(key)
    serving_packages()
    from specmoe_jax.serving.app import Settings, make_app
    from specmoe_jax.serving.metrics import ServerFigures
    from specmoe_jax.serving.runner import Runner

    check_files(read={"--prompts": _PROMPTS.value}, output=_OUTPUT.value, written={})
    with listening() as own:
        engine = engine_flags.load_engine(USUAL, requests=REQUESTS)
        if engine.model.tokenizer is None:
            raise RequestError("a server needs a tokenizer and the model has none; give the checkpoint its tokenizer.json")
        service = engine.service(max_tokens=engine_flags.MAX_TOKENS.value, max_waiting=_MAX_WAITING.value)
        runner = Runner(service, ServerFigures())
        service.warm_up()
        assert engine.model.path is not None  # it was loaded
        settings = Settings(
            name=_SERVED_NAME.value or engine_flags.MODEL.value.rstrip("/").rsplit("/", 1)[-1],
            api_key=key,
            max_body_bytes=int(_MAX_BODY_MIB.value * (1 << 20)),
            hosts=("localhost", _HOST.value) if is_loopback(_HOST.value) and ":" not in _HOST.value else None,
            defaults=sampling_defaults(engine.model.path),
        )
        with background(engine, runner):
            host = f"[{_HOST.value}]" if ":" in _HOST.value else _HOST.value
            url = f"http://{host}:{own.getsockname()[1]}"
            print(
                f"serving {settings.name} at {url} ({service.rows} rows of {service.max_tokens} tokens)",
                file=sys.stderr,
                flush=True,
            )
            serve(make_app(engine, runner, settings), own)


def check_flags(key: str | None) -> None:
    if not is_loopback(_HOST.value) and not key:
        common.usage_error(f"--host={_HOST.value} lets other machines in; give --api_key=KEY (or ${KEY_VARIABLE})")
    if bool(_PROMPTS.value) != bool(_OUTPUT.value):
        common.usage_error("--prompts and --output belong together; give both or none")
    if _RESTART.value and not _OUTPUT.value:
        common.usage_error("--restart has no effect without --output; leave it out")
    if as_table(_OUTPUT.value):
        common.usage_error(f"--output is {_OUTPUT.value}; serve writes JSON lines: give a .jsonl file")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serving_packages() -> None:
    """Before anything is loaded."""
    try:
        import starlette
        import uvicorn
    except ImportError as e:
        raise UserError(f'serve needs {e.name}; install it: pip install "specmoe_jax[serve]"') from e
    del starlette, uvicorn


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """The port, before minutes of loading."""
    family = socket.AF_INET6 if ":" in _HOST.value else socket.AF_INET
    try:
        own = socket.create_server((_HOST.value, _PORT.value), family=family)
    except OSError as e:
        raise UserError(f"cannot listen at {_HOST.value}:{_PORT.value} ({e.strerror}); give another --port or --host") from e
    with own:
        yield own


@contextlib.contextmanager
def background(engine: Engine, runner) -> Iterator[None]:
    """The job of --prompts while the server runs."""
    if not _PROMPTS.value or not _OUTPUT.value:
        yield
        return
    from specmoe_jax.serving.background import BackgroundJob

    folder = pathlib.Path(engine.model.path or "")
    prompts = read_prompts(_PROMPTS.value, SamplingParams(**sampling_defaults(folder)), keep_bad=True)
    if any(prompt.conversation for prompt in prompts):
        prompts = as_chat(prompts, folder, engine.model.tokenizer, keep_bad=True, must_work=0, every=False)
    job = BackgroundJob(engine, runner, prompts, _OUTPUT.value, restart=_RESTART.value)
    job.start()
    try:
        yield
    finally:
        job.stop()
        print(f"background job: {job.done} of {job.total} requests are done, {job.failed} failed: {_OUTPUT.value}", file=sys.stderr)


def serve(app, own: socket.socket) -> None:
    """Until a signal comes."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_S, lifespan="on")
    uvicorn.Server(config).run(sockets=[own])
