"""One job in several processes: how they find each other, and how all of them end when one does.

JAX's coordination service (heartbeats) notices a process that is gone, and a collective operation that fails tells at once. What
XLA then prints on the standard streams, in many lines, is kept from them: a job ends with one line of each process.
"""

import ctypes
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import jax

from specmoe_jax.cli import start
from specmoe_jax.support.errors import UserError

AUTO = "auto"
HEARTBEAT_S = 20  # a machine that is gone is noticed after so long; a process that is gone at once
LOST = b"error: another process of the job has ended or is not reached any more; start all of them again, and the job goes on\n"
# What the errors of collective operations and of the coordination service say.
SIGNS = ("Gloo", "NCCL", "Connection closed", "Connection reset", "oordination", "distributed service", "heartbeat")


class Joined:
    """The streams that were standard output and error before XLA's were put aside. stderr: its descriptor."""

    def __init__(self):
        sys.stdout.flush()
        sys.stderr.flush()
        self.stderr, self._aside = os.dup(2), tempfile.TemporaryFile()
        stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding)
        os.dup2(self._aside.fileno(), 1)
        os.dup2(self._aside.fileno(), 2)
        sys.stdout = start.Stdout(stdout)
        sys.stderr = io.TextIOWrapper(
            open(os.dup(self.stderr), "wb", 0), encoding="utf-8", errors="backslashreplace", write_through=True
        )
        # XLA's client ends the process from a thread of its own (abort), which no handler of Python's own sees.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def lost(self) -> None:
        os.write(self.stderr, LOST)
        os._exit(1)

    def _aborted(self, _signal_number: int) -> None:
        self._aside.seek(0)
        said = self._aside.read()
        if any(sign.encode() in said for sign in SIGNS):
            self.lost()
        os.write(self.stderr, said)
        os._exit(128 + signal.SIGABRT)


_joined: list[Joined] = []


def join(address: str, num_processes: int | None, process_id: int | None, timeout_s: int) -> None:
    """Waits for the other processes. address: of process 0, or AUTO for what JAX finds in the environment. Raises UserError."""
    found = address == AUTO
    if not found and (num_processes is None or process_id is None):
        raise UserError(
            f"--coordinator_address={address} needs --num_processes and --process_id; give both, or --coordinator_address=auto"
        )
    streams = Joined()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    where: dict[str, Any] = {} if found else {"coordinator_address": address, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            **where,
        )
    except (ValueError, RuntimeError, TypeError) as e:
        said = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"the processes of --coordinator_address={address} do not come together ({said})") from e
    _joined.append(streams)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def to_the_end(run: Callable[[], int]) -> int:
    """The exit code of a command. One that fails as one of several ends at once: JAX would wait for the others first."""
    try:
        code = run()
    except Exception as e:
        if not _joined:
            raise
        if any(sign in str(e) for sign in SIGNS):
            _joined[0].lost()
        traceback.print_exc()
        code = 1
    if _joined and code:
        sys.stdout.flush()
        os._exit(code)
    if _joined:
        jax.distributed.shutdown()
    return code
