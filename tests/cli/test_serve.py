"""specmoe serve as a person starts it: a process with a port, a job behind it, and an end by a signal; and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.cli.conftest import SCRIPTS, in_process, load_script


@pytest.fixture
def serve(capfd, monkeypatch, tmp_path):
    return in_process(load_script("serve"), capfd, monkeypatch, tmp_path)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--host=0.0.0.0"], 2, "--host=0.0.0.0 lets other machines in; give --api_key=KEY"),
        (["--prompts=p.txt"], 2, "--prompts and --output belong together"),
        (["--restart"], 2, "--restart has no effect without --output"),
        (["--host=203.0.113.7", "--api_key=k"], 1, "cannot listen at 203.0.113.7:8000"),
        (["--model=/nowhere", "--port=0"], 1, "/nowhere"),
    ],
    ids=str,
)
def test_what_it_refuses(serve, flags, code, said):
    pytest.importorskip("uvicorn")
    ran = serve(*flags)
    assert (ran.code, ran.out) == (code, "") and said in ran.err and ran.err.count("\n") == 1


@pytest.mark.slow
def test_a_server_with_a_job_behind_it(checkpoint, tmp_path):
    pytest.importorskip("uvicorn")
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    flags = ["--preset=resident", "--port=0", "--batch_size=2"]
    command = [sys.executable, str(SCRIPTS / "serve.py"), f"--model={folder}", *flags, "--prompts=p.txt", "--output=o.jsonl"]
    server = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    )
    assert server.stderr is not None
    said = next(line for line in server.stderr if line.startswith(("serving", "error")))
    url = re.search(r"http://\S+", said)
    assert said.startswith("serving model at") and url is not None, said
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
    request = urllib.request.Request(f"{url[0]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] <= 3
    while len((tmp_path / "o.jsonl").read_text().splitlines()) < 2 and server.poll() is None:
        time.sleep(0.05)
    server.send_signal(signal.SIGTERM)
    _, rest = server.communicate(timeout=60)
    assert "2 of 2 requests are done, 0 failed" in rest and "Traceback" not in rest
    assert server.returncode == 128 + signal.SIGTERM
