"""Progress in its three modes; figures in Prometheus' text format; traces."""

import gzip
import io
import json
import re
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from specmoe_jax.jobs import metrics_file as prometheus
from specmoe_jax.support import progress
from specmoe_jax.support.tracing import span, trace


@pytest.mark.parametrize("mode", ["auto", "none", True, False])
def test_silent_where_there_is_no_terminal(capfd, mode):
    with progress.bar("load", 10, "B", mode=mode) as bar:
        bar.update(10)
    assert capfd.readouterr() == ("", "")


def test_the_log_has_one_line_each_ten_seconds(capfd, monkeypatch):
    """100 seconds of an update each second, on a clock of the test."""
    seconds = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(seconds)))
    with progress.bar("decode", 100, "tok", mode="log") as bar:
        for _ in range(100):
            bar.update()
    lines = capfd.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 14  # the clock also ticks when a line is made
    assert all(re.match(r"decode: +\d+%\|.*tok/s|decode: +\d+%\|.*s/tok", line) for line in lines)
    assert "\r" not in "".join(lines)


def test_short_work_is_not_logged(capfd):
    with progress.bar("load", 3, "B", mode="log") as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="it must be one of auto, log, none"):
        progress.bar("load", 1, "B", mode="loud")


def test_prometheus_text():
    figures = {
        "new_tokens": 7,
        "tokens_per_step": 2.5,
        "acceptance_by_position": [0.5, 0.25],
        "conditional_acceptance_by_position": [0.5, None],
        "floor_s": None,
        "binding_resource": "link",
        "plan": {"preset": 'a"b\\'},
        "synthetic": ["link_bytes_per_s"],
        "requests": [{"id": 0}],
    }
    assert prometheus.text(figures).splitlines() == [
        "# TYPE specmoe_new_tokens_total counter",
        "specmoe_new_tokens_total 7",
        "# TYPE specmoe_tokens_per_step gauge",
        "specmoe_tokens_per_step 2.5",
        "# TYPE specmoe_acceptance_by_position gauge",
        'specmoe_acceptance_by_position{position="1"} 0.5',
        'specmoe_acceptance_by_position{position="2"} 0.25',
        "# TYPE specmoe_info gauge",
        'specmoe_info{preset="a\\"b\\\\",synthetic="link_bytes_per_s"} 1',
    ]


def test_a_trace_holds_the_spans(tmp_path):
    with trace(str(tmp_path)), span("verify"):
        jax.block_until_ready(jnp.arange(3) + 1)
    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))
    assert "verify" in {event.get("name") for event in events["traceEvents"]}


def test_no_trace(tmp_path):
    with trace(None):
        pass
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_time_goes_on_where_nothing_calls_update(monkeypatch):
    """A compilation tells nothing until it is over; its bar was shown then."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    with progress.bar("compile", None, "step", mode="auto", leave=False) as shown, progress.ticking(shown):
        deadline = time.monotonic() + 10
        while "compile: 00:0" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "compile: 00:0" in terminal.getvalue()
    assert not any(thread.name == "specmoe-progress" for thread in threading.enumerate())


def test_a_silent_bar_has_no_thread():
    with progress.bar("compile", None, "step", mode="none") as shown, progress.ticking(shown):
        assert not any(thread.name == "specmoe-progress" for thread in threading.enumerate())


def test_a_line_beside_a_bar_begins_at_the_edge(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    with progress.bar("decode", 8, "tok", mode="auto") as shown:
        shown.update(1)
        with progress.beside_bars():
            print("an answer")
    before, _, after = terminal.getvalue().partition("an answer\n")
    assert "decode" in before and before.endswith("\r") and "decode" in after
