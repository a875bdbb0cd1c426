"""`generate` in two processes: one file, as of one process, and one line where the other one dies. See kill_processes.py."""

import subprocess
import time

import pytest

from specmoe_jax.benchmarks.studies.kill_processes import answers, command, end_of_other, go_on, start, write_job
from specmoe_jax.cli.processes import LOST


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a job that one process has done."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, requests=6)
    go_on(folder, "whole.jsonl", 1)
    assert len(answers(folder, "whole.jsonl")) == 6
    return folder


@pytest.mark.parametrize(("victim", "successors"), [(1, 1), (0, 2)])
def test_a_process_that_dies_ends_the_job_and_others_go_on_with_it(job, victim, successors):
    name = f"killed_{victim}.jsonl"
    both = start(job, name)
    while not answers(job, name) and both[0].poll() is None:
        time.sleep(0.05)
    code, said, seconds = end_of_other(both, victim=victim)
    assert (code, said) == (1, LOST.decode()) and seconds < 60
    assert 0 < len(answers(job, name)) < 6
    go_on(job, name, successors)
    assert answers(job, name) == answers(job, "whole.jsonl")


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator_address=127.0.0.1:1"], "needs --num_processes and --process_id"),
        (["--process_id=1"], "--process_id has no effect without --coordinator_address; give both"),
        (["--num_processes=2", "--devices=2"], "and jax.distributed has 1; start as many, or leave it 1"),
        (["--coordinator_address=127.0.0.1:1", "--num_processes=1", "--process_id=1"], "do not come together"),
    ],
)
def test_flags_that_do_not_go_together(job, flags, said):
    done = subprocess.run([*command(job, "none.jsonl"), *flags], capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2) and said in done.stderr and done.stderr.count("\n") == 1
