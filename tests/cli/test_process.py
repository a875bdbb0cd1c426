"""A command as a process: stops in every phase of it, standard streams that are closed, full, left or without UTF-8."""

import io
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from specmoe_jax.cli import common, start

ROOT = pathlib.Path(__file__).parents[2]
READY = "import sys, os, time, atexit; from specmoe_jax.cli import start; start.prepare(); "
SLEEP = "print('ready', flush=True); time.sleep(60)"
AT_EXIT = "atexit.register(lambda: (print('ready', flush=True), time.sleep(60))); "
# What is sent once the process is ready, the exit code, what is on stderr.
PHASES = {
    "while it imports": (READY + SLEEP, [signal.SIGINT], 130, "error: stopped by SIGINT\n"),
    "while it imports, SIGTERM": (READY + SLEEP, [signal.SIGTERM], 143, "error: stopped by SIGTERM\n"),
    "a second one while it ends": (
        READY + f"""
def main():
    try:
        {SLEEP}
    except start.Stopped:
        {SLEEP}
start.stoppable(main)""",
        [signal.SIGTERM, signal.SIGINT],
        130,
        "",
    ),
    "after the work": (READY + AT_EXIT + "start.stoppable(lambda: 0)", [signal.SIGTERM], 0, ""),
    "after a failure": (READY + AT_EXIT + "sys.exit(start.stoppable(lambda: 1))", [signal.SIGINT], 1, ""),
}  # fmt: skip


@pytest.mark.every_case
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_is_one_line_at_most(phase):
    code, signals, expected, said = PHASES[phase]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        for number in signals:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        assert (process.wait(30), process.stderr.read()) == (expected, said)


def test_nothing_large_is_imported_before_a_command():
    """So that Ctrl-C at once, --help and wrong usage do not wait for JAX."""
    code = "import sys; from specmoe_jax.cli import main; print(sorted({'jax', 'numpy', 'absl'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


@pytest.mark.every_case
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nobody_elses(tmp_path, closed):
    """What is opened first would get its number, and what is printed there; and sys.stderr would be None."""
    code = READY + "f = open(sys.argv[1], 'w'); f.write('whole'); print('x'); sys.stderr.isatty(); print('y', file=sys.stderr)"
    command = f'"{sys.executable}" -c "{code}" {tmp_path / "file"} {closed}'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "whole"


def test_a_character_that_the_terminal_lacks_is_escaped():
    """Before, everything was generated and then lost."""
    code = READY + r"print('caf\u00e9 \u2028'); print('the next one')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert out == b"caf\\xe9 \\u2028\nthe next one\n"


@pytest.fixture
def guarded(monkeypatch, capfd):
    """Runs a main: main, its stdout -> exit code and stderr. The handlers of signals are put back."""
    handlers = {number: signal.getsignal(number) for number in start.STOPS}
    monkeypatch.setattr(common, "raise_pinned_limit", lambda: None)

    def run(main, stdout=None):
        if stdout is not None:
            monkeypatch.setattr(sys, "stdout", stdout)
        code = 0
        try:
            common.guarded(main)
        except SystemExit as e:
            code = e.code
        return code, capfd.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def left_by_its_reader(buffering):
    reads, writes = os.pipe()
    os.close(reads)
    return open(writes, "wb", buffering=buffering)


@pytest.mark.every_case
@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_is_a_quiet_end(guarded, flush, buffering):
    """`| head`, a pager that is left; PYTHONUNBUFFERED."""
    with start.Stdout(io.TextIOWrapper(left_by_its_reader(buffering), write_through=buffering == 0)) as stdout:
        assert guarded(lambda: print("text", flush=flush), stdout) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(guarded):
    with start.Stdout(open("/dev/full", "w")) as stdout:
        assert guarded(lambda: print("text"), stdout) == (1, "error: cannot write to stdout (No space left on device)\n")


def test_another_system_error_stays_what_it_is(guarded):
    with pytest.raises(FileNotFoundError):
        guarded(lambda: open("/nowhere/x"))


@pytest.mark.every_case
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1 GiB\nfor an array"),
        RuntimeError("can't start new thread"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_refused_is_one_line(guarded, error):
    """As under ulimit -v."""

    def main():
        raise error

    code, said = guarded(main)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith(f"error: the system gave no memory ({str(error).splitlines()[0]}); give a smaller --batch_size")


def test_another_runtime_error_is_no_matter_of_memory(guarded):
    def main():
        raise RuntimeError("a fault of the program's own")

    with pytest.raises(RuntimeError, match="own"):
        guarded(main)
