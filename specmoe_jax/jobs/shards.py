"""Parts of a job that run apart, on machines that share nothing, and the one output that their answers make together.

A shard is a block of consecutive prompts. Its requests keep the numbers that they have in the whole job, so its answers do too:
sampling is keyed by the number.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from specmoe_jax.jobs.journal import Journal, read_identity
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.jobs.tables import in_order, lines_of, write_table
from specmoe_jax.support.atomic_files import replacing, write_atomically
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_whole

OWN_FIELDS = ("shard", "requests")  # of a shard's identity, beside that of the whole job


class Shard(NamedTuple):
    """number: 1 to count."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def block(self, requests: int) -> range:
        """The numbers of its requests. Raises RequestError where there are fewer requests than shards."""
        if requests < self.count:
            raise RequestError(f"the shard is {self} and there are {requests} prompts; give at most {requests} shards")
        return range(requests * (self.number - 1) // self.count, requests * self.number // self.count)

    def output(self, path: str) -> str:
        """The shard's own file: answers.jsonl -> answers.2-of-8.jsonl."""
        file = pathlib.Path(path)
        return str(file.with_name(f"{file.stem}.{self.number}-of-{self.count}{file.suffix}"))


class Part(NamedTuple):
    """What one run does of a job: all its prompts, or those of a shard.

    prompts: of the whole job. output: where the answers of this run go; None for standard output.
    """

    prompts: list[Prompt]
    shard: Shard | None
    output: str | None

    @property
    def first(self) -> int:
        """The number of the first one of `own`."""
        return 0 if self.shard is None else self.shard.block(len(self.prompts)).start

    @property
    def own(self) -> list[Prompt]:
        return self.prompts if self.shard is None else [self.prompts[number] for number in self.shard.block(len(self.prompts))]

    @property
    def identity(self) -> dict[str, Any]:
        """Beside the whole job's."""
        return {} if self.shard is None else dict(zip(OWN_FIELDS, (str(self.shard), len(self.prompts)), strict=True))


def parse_shard(text: str) -> Shard:
    """ "2/8" -> Shard(2, 8). Raises RequestError."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    shard = Shard(*map(int, found.groups())) if found else None
    if shard is None or not 1 <= shard.number <= shard.count:
        raise RequestError(f"the shard is {text!r}; give number/count from 1/n to n/n, for example 3/8")
    return shard


def merge(output: str) -> int:
    """Joins the answers of all shards of `output` in the order of the prompts, as the finished output of the whole job.

    -> how many. The shards stay. Raises RequestError where `output` exists, and where shards are missing, unfinished, still
    being written or of several jobs.
    """
    lines = lines_of(output)
    for path in (output, lines):
        if pathlib.Path(path).exists():
            raise RequestError(f"{path} exists; move it away, or give the --output whose shards are to be joined")
    shards = _shards(output)
    job, requests = _job(output, shards)
    with contextlib.ExitStack() as held, replacing(lines) as file:
        with open(file, "wb") as merged:
            for shard in shards:
                merged.writelines(_answers(output, shard, requests, held))
        write_atomically(f"{lines}.journal", json.dumps(job))
    write_table(output)
    return requests


def _shards(output: str) -> list[Shard]:
    """Those whose files are there: all of one count, and none missing."""
    stem, lines = pathlib.Path(output).stem, pathlib.Path(lines_of(output))
    name = re.compile(rf"{re.escape(stem)}\.([0-9]+)-of-([0-9]+){re.escape(lines.name.removeprefix(stem))}")
    names = sorted(path.name for path in lines.parent.glob("*"))
    shards = sorted(Shard(*map(int, found.groups())) for found in map(name.fullmatch, names) if found)
    if not shards:
        raise RequestError(f"there are no shards of {output}, such as {lines_of(Shard(1, 8).output(output))}; run them first")
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        said = f"there are shards of {' and of '.join(map(str, counts))} beside {output}"
        raise RequestError(f"{said}; move those of one job away")
    missing = sorted(set(range(1, counts[0] + 1)) - {shard.number for shard in shards})
    if missing:
        said = f"of the {counts[0]} shards of {output} these are missing: {', '.join(map(str, missing[:8]))}"
        raise RequestError(f"{said}{', ...' if missing[8:] else ''}; run them first")
    return shards


def _job(output: str, shards: Sequence[Shard]) -> tuple[dict[str, Any], int]:
    """The identity of the whole job, which all shards have in common, and its requests."""
    identities = [_identity(output, shard) for shard in shards]
    first = identities[0]
    for identity in identities[1:]:
        changed = sorted(key for key in identity.keys() | first.keys() if identity.get(key) != first.get(key) and key != "shard")
        if changed:
            said = f"shards {first['shard']} and {identity['shard']} of {output} are of jobs with other {', '.join(changed)}"
            raise RequestError(f"{said}; run one of them again with --restart")
    return {key: value for key, value in first.items() if key not in OWN_FIELDS}, first["requests"]


def _identity(output: str, shard: Shard) -> dict[str, Any]:
    path = lines_of(shard.output(output))
    identity = read_identity(path) or {}
    if not is_whole(identity.get("requests")) or identity.get("shard") != str(shard):
        said = f"{path} is not shard {shard} of a job, by {path}.journal it is {identity.get('shard', 'none')}"
        raise RequestError(f"{said}; give both files as the shard's run left them")
    return identity


def _answers(output: str, shard: Shard, requests: int, held: contextlib.ExitStack) -> Iterator[bytes]:
    """Lines of a finished shard in the order of their prompts. Its lock is `held` from here on."""
    path, block = lines_of(shard.output(output)), set(shard.block(requests))
    journal = held.enter_context(contextlib.closing(Journal(path, _identity(output, shard), requests=requests)))
    if foreign := sorted(journal.done - block):
        raise RequestError(f"{path} answers prompt {foreign[0]}, which is of another shard; run it again with --restart")
    if missing := len(block - journal.done):
        raise RequestError(
            f"shard {shard} of {output} is not finished, {missing} of {len(block)} answers are missing; run it again"
        )
    with open(path, "rb") as lines:
        for place in in_order(lines):
            lines.seek(place)
            yield lines.readline()
