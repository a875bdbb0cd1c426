"""The actors of a Ray Data job, without Ray: batches as tables, killed workers as journals that end in the middle."""

import pytest

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.ray_data import Answers
from specmoe_jax.support.errors import RequestError
from specmoe_jax.testing import byte_tokenizer, write_tiny

pa = pytest.importorskip("pyarrow")
ROWS = [
    {"index": 7, "prompt": "Call me", "temperature": None},
    {"index": 3, "prompt": "Ishmael", "temperature": 0.9},
    {"index": 5, "prompt": "", "temperature": None},
    {"index": 4, "prompt": "Some years ago", "temperature": 0.9},
]
PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture
def actor(checkpoint, tmp_path):
    return lambda: Answers(checkpoint, str(tmp_path / "journals"), "on_demand", params=PARAMS)


def answers(actor, *batches):
    rows = [row for batch in batches for row in actor(pa.Table.from_pylist(batch)).to_pylist()]
    return {row["index"]: row for row in rows}


def test_answers_do_not_depend_on_the_batches(actor):
    """Sampling is keyed by the number in the whole job; a row that cannot be served has a record as any other."""
    whole, parts = answers(actor(), ROWS), answers(actor(), ROWS[:1], ROWS[1:3], ROWS[3:])
    assert whole == parts and sorted(whole) == [3, 4, 5, 7]
    assert whole[5]["finish_reason"] == "error" and "empty" in whole[5]["error"]
    assert whole[3]["text"] and whole[3]["num_new_tokens"] == 5 and whole[3]["error"] is None
    assert whole[7]["id"] == "7" and whole[7]["prompt"] == "Call me"


def test_a_batch_that_runs_again_reads_what_was_finished(actor, tmp_path, monkeypatch):
    """The first worker dies after two records: the second generates the others alone."""

    def die(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        seen = []
        real = jobs.record
        patch.setattr(jobs, "record", lambda *args: real(*args) if len(seen) < 2 and not seen.append(args) else die())
        with pytest.raises(SystemExit):
            answers(actor(), ROWS)
    (journal,) = (tmp_path / "journals").glob("*.jsonl")
    assert journal.read_bytes().count(b"\n") == 2
    asked, stream = [], Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, *args, ids, **how: asked.extend(ids) or stream(self, *args, ids=ids, **how))
    again = answers(actor(), ROWS)
    assert len(asked) == 2 and len(again) == 4
    assert answers(actor(), ROWS) == again and len(asked) == 2


@pytest.mark.parametrize("rows", [[{"prompt": "a"}], [{"index": 1, "prompt": "a"}] * 2, [{"index": -1, "prompt": "a"}]])
def test_rows_without_a_number_of_their_own(actor, rows):
    with pytest.raises(RequestError, match="the column index must number each row"):
        answers(actor(), rows)
