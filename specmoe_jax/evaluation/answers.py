"""What has been answered of an evaluation, on disk: a second run of the same evaluation goes on where the first one ended."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from specmoe_jax.checkpoints.manifest import model_hash
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs.journal import Journal

KEY_BITS = 60


class Answers:
    """path: of the journal, None to keep nothing. A part of the work that is done survives whatever follows. restart: forget it.

    Raises RequestError for a file that belongs to another model, or to another job.
    """

    def __init__(self, engine: Engine, path: str | None, *, restart: bool = False):
        self._known: dict[int, Any] = {}
        self._journal = None
        if path is None:
            return
        self._journal = Journal(path, _identity(engine), restart=restart)
        with open(path, encoding="utf-8") as file:
            self._known = {record["index"]: record["answer"] for record in map(json.loads, file)}

    def of(self, kind: str, questions: Sequence[Any], ask: Callable[[list[int]], list[Any]], at_once: int, told: Any) -> list[Any]:
        """The answers to JSON-like questions. ask: numbers of some questions -> their answers. told: a bar, or has `update`."""
        keys = [_key(kind, question) for question in questions]
        first = {key: number for number, key in reversed([*enumerate(keys)])}  # a question may be asked twice
        open_ones = sorted(number for key, number in first.items() if key not in self._known)
        told.update(len(keys) - len(open_ones))
        for some in _split(open_ones, at_once):
            records = {keys[number]: answer for number, answer in zip(some, ask(some), strict=True)}
            if self._journal is not None:
                self._journal.append(*({"index": key, "answer": answer} for key, answer in records.items()))
            self._known |= records
            told.update(len(some))
        return [self._known[key] for key in keys]

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def _identity(engine: Engine) -> dict:
    """What the answers depend on beside the questions."""
    return {
        "evaluation": 1,
        "model": model_hash(engine.model),
        "dtype": engine.plan.dtype,
        "expert_dtype": engine.plan.expert_dtype,
        "synthetic_acceptance": engine.plan.synthetic_acceptance,
    } | ({"dense_dtype": engine.plan.dense_dtype} if engine.plan.dense_dtype else {})


def _key(kind: str, question: Any) -> int:
    digest = hashlib.sha256(json.dumps([kind, question], sort_keys=True).encode()).hexdigest()
    return int(digest, 16) >> (256 - KEY_BITS)


def _split(numbers: list[int], at_once: int) -> Iterator[list[int]]:
    return (numbers[start : start + at_once] for start in range(0, len(numbers), at_once))
