"""Shards of a job: which prompts are whose, and the outputs that are joined or refused. tests/cli/test_shards.py runs them."""

import json
import pathlib

import pytest

from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.shards import Part, Shard, merge, parse_shard
from specmoe_jax.support.errors import RequestError

JOB = {"prompts": "abc", "model": "m"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "a.jsonl"


def write(out, shard, requests, *, job=JOB, skip=(), more=()):
    """A shard's output, its answers in reverse."""
    part = Part([None] * requests, shard, shard.output(str(out)))
    journal = Journal(part.output, job | part.identity, requests=requests)
    for index in [*reversed(shard.block(requests)), *more]:
        if index not in skip:
            journal.append({"index": index, "text": f"caf\u00e9 {index}"})
    journal.close()


def answers(out):
    return [json.loads(line) for line in out.read_bytes().splitlines()]


@pytest.mark.parametrize(("requests", "count"), [(10, 3), (7, 7), (1, 1), (1000, 16)])
def test_blocks_cover_all_once_and_differ_by_one_at_most(requests, count):
    blocks = [Shard(number, count).block(requests) for number in range(1, count + 1)]
    assert [index for block in blocks for index in block] == list(range(requests))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "-1/2", "1/2/3", " 1/2", "a/b", "1/2\n"])
def test_what_is_no_shard(text):
    with pytest.raises(RequestError, match="1/n to n/n"):
        parse_shard(text)


def test_more_shards_than_prompts():
    assert parse_shard("2/3") == Shard(2, 3)
    with pytest.raises(RequestError, match="at most 2 shards"):
        Shard(2, 3).block(2)


def test_names(tmp_path):
    assert Shard(2, 8).output("a/b.c.jsonl") == "a/b.c.2-of-8.jsonl"
    assert Shard(2, 8).output("answers") == "answers.2-of-8"


@pytest.mark.parametrize("name", ["a.jsonl", "[a].b.jsonl", "answers"])
def test_the_order_is_that_of_the_prompts(tmp_path, name):
    out = tmp_path / name
    for number in (2, 1, 3):
        write(out, Shard(number, 3), 11)
    assert merge(str(out)) == 11
    assert [answer["index"] for answer in answers(out)] == list(range(11))
    assert answers(out)[4]["text"] == "caf\u00e9 4"
    journal = Journal(str(out), JOB, requests=11)  # it is the whole job's finished output
    assert journal.done == set(range(11))
    journal.close()
    with pytest.raises(RequestError, match="exists; move it away"):
        merge(str(out))


def broken_number(out):
    write(out, Shard(1, 3), 5)
    write(out, Shard(3, 3), 5)


def broken_unfinished(out):
    write(out, Shard(1, 2), 5)
    write(out, Shard(2, 2), 5, skip=(3,))


def broken_counts(out):
    for shard in (Shard(1, 2), Shard(2, 2), Shard(1, 3)):
        write(out, shard, 5)


def broken_job(out):
    write(out, Shard(1, 2), 5)
    write(out, Shard(2, 2), 5, job=JOB | {"model": "n"})


def broken_requests(out):
    write(out, Shard(1, 2), 5)
    write(out, Shard(2, 2), 6)


def broken_copy(out):
    """The same shard twice, the second under the other's name."""
    write(out, Shard(1, 2), 4)
    for ending in ("", ".journal"):
        source, target = (pathlib.Path(shard.output(str(out)) + ending) for shard in (Shard(1, 2), Shard(2, 2)))
        target.write_bytes(source.read_bytes())


def broken_journal(out):
    write(out, Shard(1, 1), 2)
    out.with_name("a.1-of-1.jsonl.journal").unlink()


def broken_foreign(out):
    write(out, Shard(1, 2), 4, more=(2,))
    write(out, Shard(2, 2), 4)


def broken_twice(out):
    write(out, Shard(1, 1), 3, more=(1,))


def broken_torn(out):
    write(out, Shard(1, 1), 3)
    path = out.with_name("a.1-of-1.jsonl")
    path.write_bytes(path.read_bytes()[:-1])


def broken_nothing(out):
    pass


BROKEN = {
    broken_number: "of the 3 shards of .* these are missing: 2; run them first",
    broken_unfinished: "shard 2/2 of .* is not finished, 1 of 3 answers are missing; run it again",
    broken_counts: "shards of 2 and of 3 beside",
    broken_job: "shards 1/2 and 2/2 of .* are of jobs with other model;",
    broken_requests: "are of jobs with other requests;",
    broken_copy: "is not shard 2/2 of a job, by .*journal it is 1/2",
    broken_journal: "is not shard 1/1 of a job, by .*journal it is none",
    broken_foreign: "answers prompt 2, which is of another shard",
    broken_twice: "index 1 is there twice",
    broken_torn: "1 of 3 answers are missing",
    broken_nothing: "there are no shards of .*a.1-of-8.jsonl; run them first",
}


@pytest.mark.every_case
@pytest.mark.parametrize(("make", "said"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_not_joined(out, make, said):
    make(out)
    with pytest.raises(RequestError, match=said) as refused:
        merge(str(out))
    assert "\n" not in str(refused.value)
    assert not out.exists() and not list(out.parent.glob(".*"))


def test_a_shard_that_is_being_written(out):
    write(out, Shard(1, 1), 2)
    part = Part([None] * 2, Shard(1, 1), Shard(1, 1).output(str(out)))
    journal = Journal(part.output, JOB | part.identity, requests=2)
    with pytest.raises(RequestError, match="another process writes"):
        merge(str(out))
    journal.close()
    assert merge(str(out)) == 2
