"""What a command needs before anything large is imported: its standard streams, signals, and errors of usage."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or Ctrl-C: not an Exception, so that no handler on the way mistakes it for a failure."""

    def __init__(self, signal_number: int):
        self.signal = signal.Signals(signal_number)


class Stdout(io.TextIOWrapper):
    """Standard output that escapes what its encoding lacks, and knows whether it could not be written.

    An unbuffered stream forgets what failed, so a later flush does not tell.
    """

    failed = False

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._stream = stream  # which would close their buffer when it goes

    def write(self, text: str) -> int:
        with self._noticing():
            return super().write(text)

    def flush(self) -> None:
        with self._noticing():
            super().flush()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.failed = True
            raise


def prepare() -> None:
    """To be called first: a closed stream stays nobody's, no character stops an answer, a stop meanwhile is one line."""
    open_closed_descriptors()
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper) and not isinstance(sys.stdout, Stdout):
        sys.stdout = Stdout(sys.stdout)
    for number in STOPS:
        signal.signal(number, _leave_while_starting)


def open_closed_descriptors() -> None:
    """Else the first file that is opened would get the number of a closed standard stream, and what is printed there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def usage_error(message: str) -> NoReturn:
    """Ends the command with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def stoppable(main: Callable[[], int]) -> int:
    """Calls `main()`, whose exit code it returns; a stop raises Stopped in it, a second one ends the process at once.

    After it a stop ends the process without a word, with the exit code that it would have had.
    """
    for number in STOPS:
        signal.signal(number, _stop)
    try:
        code = main()
    except Stopped as e:  # while another end was being told
        code = 128 + e.signal
    for number in STOPS:
        signal.signal(number, lambda *_: os._exit(code))
    return code


def stdout_failed() -> bool:
    """Whether nothing can be written to standard output any more; what is left of it is dropped then."""
    failed = getattr(sys.stdout, "failed", False)
    try:
        sys.stdout.flush()
    except OSError:
        failed = True
    if failed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    return failed


def _stop(signal_number: int, _frame) -> None:
    for number in STOPS:
        signal.signal(number, lambda again, _: os._exit(128 + again))
    raise Stopped(signal_number)


def _leave_while_starting(signal_number: int, _frame) -> None:
    """Nothing is there to be cleaned up, and an exception in the middle of an import would be anything but one line."""
    os.write(2, f"error: stopped by {signal.Signals(signal_number).name}\n".encode())
    os._exit(128 + signal_number)
