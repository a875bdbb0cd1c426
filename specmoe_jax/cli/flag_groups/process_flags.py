"""The flags by which the processes of one job find each other, with the names of jax.distributed.initialize."""

from absl import flags

from specmoe_jax.cli import processes
from specmoe_jax.cli.flag_groups import plan_flags
from specmoe_jax.cli.start import usage_error

_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, or auto for what JAX finds (SLURM, Open MPI, Kubernetes, TPU pods): one job in --num_processes.",
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of --num_processes this is, from 0.", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer("initialization_timeout", 30, "Seconds to wait for the other processes.", lower_bound=1)


def join() -> None:
    """Waits for the other processes where the flags say that there are some."""
    if _ADDRESS.value is None:
        for flag in (_PROCESS_ID, _TIMEOUT):
            if flag.present:
                usage_error(f"--{flag.name} has no effect without --coordinator_address; give both")
        return
    processes.join(_ADDRESS.value, plan_flags.value("num_processes"), _PROCESS_ID.value, _TIMEOUT.value)
