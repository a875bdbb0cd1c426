"""A job of `generate` in several processes: all run it, the first one writes. See cli/processes.py."""

import json
from collections.abc import Iterable

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.prompts import STDIN
from specmoe_jax.jobs.shards import Part
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.models.model import Model
from specmoe_jax.support import processes
from specmoe_jax.support.errors import RequestError


def check_flags(*, auto: bool, prompts: str | None) -> None:
    """What a job in several processes cannot be. Raises RequestError."""
    if processes.several() and auto:
        raise RequestError("--preset=auto chooses for one machine; name a --preset or a --plan for several processes")
    if processes.several() and prompts == STDIN:
        raise RequestError("every process reads the prompts, and - is the standard input of one; give --prompts a file")


def check_alike(part: Part, model: Model, plan: Plan, popularity: np.ndarray | None, routing: str | None) -> None:
    """Raises RequestError, in every process, where they would not do the same. routing: of Engine."""
    if not processes.several():
        return
    assert model.path is not None  # it was loaded
    job = jobs.fingerprint(part.prompts, plan, model.path, model.adapter, routing)
    own = {name: json.dumps(value).encode() for name, value in job.items()} | {"plan": plan.to_json().encode()}
    own |= {"popularity": b"" if popularity is None else popularity.tobytes()}
    if other := processes.differing(own):
        raise RequestError(f"the processes of the job see other {', '.join(other)}; give all the same files and flags")


def follow(engine: Engine, part: Part) -> None:
    """The job in a process that is not the first: it runs, and writes nothing."""
    todo = agreed_numbers(())
    prompts = {number: prompt for number, prompt in enumerate(part.own, part.first) if number in todo}
    for _ in jobs.completions(engine, prompts, JobWatch(engine, [], progress="none")):
        pass


def agreed_numbers(numbers: Iterable[int]) -> set[int]:
    """The first process's, in all: the requests still to do, which its file knows."""
    return set(json.loads(processes.agreed_bytes(json.dumps(sorted(numbers)).encode())))
