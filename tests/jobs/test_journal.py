"""The journal, killed at every byte, misused in every way that users will try."""

import json
import os

import pytest

from specmoe_jax.jobs.journal import Journal
from specmoe_jax.support.errors import RequestError

JOB = {"prompts": "abc", "model": "m"}
RECORDS = [{"index": index, "text": "caf\u00e9 \u2028" * index} for index in (2, 0, 1)]


def write(path, records=RECORDS, job=JOB):
    journal = Journal(str(path), job)
    for record in records:
        if record["index"] not in journal.done:
            journal.append(record)
    journal.close()


def lines(path):
    return sorted(path.read_bytes().splitlines())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def test_a_job_killed_at_any_byte_ends_in_the_same_file(tmp_path, out):
    write(out)
    whole, expected = out.read_bytes(), lines(out)
    for cut in range(len(whole) + 1):
        torn = tmp_path / f"{cut}.jsonl"
        write(torn, [])
        torn.write_bytes(whole[:cut])
        finished = whole[:cut].count(b"\n")
        journal = Journal(str(torn), JOB)
        assert len(journal.done) == finished  # nothing finished is lost
        journal.close()
        write(torn)
        assert lines(torn) == expected


def test_a_torn_journal_is_a_job_that_never_began(out):
    write(out)
    journal = out.with_name("out.jsonl.journal")
    journal.write_text(journal.read_text()[:5])
    with pytest.raises(RequestError, match="no output of a job"):  # the output has lines, so something is wrong
        Journal(str(out), JOB)
    out.unlink()
    write(out)
    assert len(lines(out)) == 3


def test_another_job_is_refused_with_what_changed(out):
    write(out)
    with pytest.raises(RequestError, match="other model; "):
        Journal(str(out), JOB | {"model": "n"})
    Journal(str(out), JOB | {"model": "n"}, restart=True).close()
    assert out.read_bytes() == b""


def test_an_output_of_somebody_else_is_not_touched(out):
    out.write_text("my notes\n")
    with pytest.raises(RequestError, match="is no output of a job"):
        Journal(str(out), JOB)
    assert out.read_text() == "my notes\n"


def test_lines_of_somebody_else_are_refused(out):
    write(out)
    out.write_text('{"id": 3}\n')
    with pytest.raises(RequestError, match="no job wrote"):
        Journal(str(out), JOB)


def test_a_second_process_is_refused(out):
    first = Journal(str(out), JOB)
    with pytest.raises(RequestError, match="another process"):
        Journal(str(out), JOB)
    first.close()
    Journal(str(out), JOB).close()


def test_a_second_process_is_refused_through_a_link_too(out):
    first = Journal(str(out), JOB)
    other = out.with_name("link.jsonl")
    other.symlink_to(out)
    with pytest.raises(RequestError, match="another process"):
        Journal(str(other), JOB)
    first.append(RECORDS[0])
    first.close()
    second = Journal(str(other), JOB)
    assert second.done == {RECORDS[0]["index"]}
    second.close()


def test_a_full_disk_leaves_whole_lines(out, monkeypatch):
    journal = Journal(str(out), JOB)
    journal.append(RECORDS[0])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RequestError, match=r"No space left on device.*1 requests are safe"):
            journal.append(RECORDS[1])
    journal.close()
    assert [json.loads(line)["index"] for line in out.read_bytes().splitlines()] == [2]
    write(out)
    assert len(lines(out)) == 3


@pytest.mark.parametrize("text", ["[]", "5", '"a"', "[" * 100_000, "null"])
def test_a_journal_that_is_no_object_is_a_job_that_never_began(out, text):
    out.with_name("out.jsonl.journal").write_text(text)
    write(out)
    assert len(lines(out)) == 3
    out.with_name("out.jsonl.journal").write_text(text)
    with pytest.raises(RequestError, match="no output of a job"):
        Journal(str(out), JOB)


def test_a_line_nested_too_deep_is_refused(out):
    write(out)
    out.write_text("[" * 100_000 + "\n")
    with pytest.raises(RequestError, match="no job wrote"):
        Journal(str(out), JOB)


@pytest.mark.parametrize("restart", [False, True])
def test_a_disk_that_is_full_before_the_job_begins(out, monkeypatch, restart):
    """Nothing of it is left that the next start would take for a job."""

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RequestError, match=r"cannot write .*out.jsonl.journal \(No space left on device\)"):
            Journal(str(out), JOB, restart=restart)
    assert not out.exists()
    write(out)
    assert len(lines(out)) == 3


def test_an_output_that_cannot_be_removed_is_refused(out):
    out.mkdir()
    with pytest.raises(RequestError, match="cannot write"):
        Journal(str(out), JOB, restart=True)


def test_an_output_in_no_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match="choose another --output"):
        Journal(str(tmp_path / "no" / "out.jsonl"), JOB)


NO_ANSWERS = {
    '{"index": true, "text": ""}': "line 2 (its index is 'True')",
    '{"index": NaN, "text": ""}': "line 2 (its index is 'nan')",
    '{"index": 1.0, "text": ""}': "line 2 (its index is '1.0')",
    '{"index": -1, "text": ""}': "line 2 (its index is '-1')",
    '{"index": 3, "text": ""}': "line 2 (its index is '3')",  # of three: 0, 1, 2
    '{"index": 2, "text": ""}': "line 2 (index 2 is there twice)",
    '{"index": 1}': "line 2 (it holds no answer)",
    "[1]": "line 2 (its index is 'None')",
    "{": "line 2 (",
}


@pytest.mark.every_case
@pytest.mark.parametrize(("line", "said"), NO_ANSWERS.items())
def test_a_line_that_answers_no_request_is_refused_with_its_number(out, line, said):
    write(out, RECORDS[:1])
    before = out.read_text() + line + "\n"
    out.write_text(before)
    with pytest.raises(RequestError) as refused:
        Journal(str(out), JOB, requests=3)
    assert said in str(refused.value) and "--restart" in str(refused.value)
    assert out.read_text() == before


def remove(out):
    out.unlink()


def move(out):
    out.rename(out.with_name("elsewhere"))


def replace(out):
    out.with_name("other").write_text(out.read_text())
    out.with_name("other").rename(out)


def move_folder(out):
    out.parent.rename(out.parent.with_name("moved"))


def remove_journal(out):
    out.with_name("out.jsonl.journal").unlink()


@pytest.mark.every_case
@pytest.mark.parametrize("act", [remove, move, replace, move_folder, remove_journal])
def test_an_output_that_goes_away_is_noticed(tmp_path, act):
    (tmp_path / "folder").mkdir()
    out = tmp_path / "folder" / "out.jsonl"
    journal = Journal(str(out), JOB)
    journal.append(RECORDS[0])
    journal.check_present()
    act(out)
    for noticed in (lambda: journal.append(RECORDS[1]), journal.check_present):
        with pytest.raises(RequestError, match=r"was removed, replaced or unmounted while the job ran"):
            noticed()
    journal.close()
