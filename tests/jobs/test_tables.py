"""Prompts from parquet files, saved datasets and standard input; answers as parquet."""

import io
import json
import types

import pytest

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.jobs.job import record
from specmoe_jax.jobs.prompts import Prompt, read_prompts
from specmoe_jax.jobs.tables import check_output, lines_of, write_table
from specmoe_jax.support.errors import RequestError
from specmoe_jax.types import TokenLogprob

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DEFAULTS = SamplingParams()
ROWS = [
    {"prompt": "a", "id": "first", "max_new_tokens": 3},
    {"prompt": "b\u2028c", "temperature": 0.5, "stop": ["x", "y"]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "me"}]},
]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_rows_are_json_lines(tmp_path):
    """Nulls, which a table has for every field that another row has, are as if they were not there."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = list(dict.fromkeys(name for row in ROWS for name in row))
    table = write(tmp_path / "prompts.parquet", [{name: row.get(name) for name in columns} for row in ROWS])
    assert read_prompts(table, DEFAULTS) == read_prompts(str(lines), DEFAULTS)


def test_a_column_of_texts_ids_or_messages(tmp_path):
    rows = [{"question": "why", "label": 3, "id": 7}, {"question": "how", "label": 4, "id": 8}]
    path = write(tmp_path / "q.parquet", rows)
    assert [(p.id, p.text) for p in read_prompts(path, DEFAULTS, column="question")] == [(7, "why"), (8, "how")]
    ids = read_prompts(write(tmp_path / "ids.parquet", [{"tokens": [1, 2]}]), DEFAULTS, column="tokens")
    assert ids[0].token_ids == (1, 2)
    (talk,) = read_prompts(write(tmp_path / "m.parquet", [{"chat": ROWS[2]["messages"]}]), DEFAULTS, column="chat")
    assert talk.conversation.messages[1]["name"] == "me" and "name" not in talk.conversation.messages[0]
    for column, message in (("answer", "no column 'answer'; its columns are question, label, id"), (None, "row 1 has no text")):
        with pytest.raises(RequestError, match=message):
            read_prompts(path, DEFAULTS, column=column)
    kept = read_prompts(path, DEFAULTS, keep_bad=True)
    assert [p.error is not None for p in kept] == [True, True]
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(RequestError, match="has no columns"):
        read_prompts(str(tmp_path / "a.txt"), DEFAULTS, column="question")


def test_folders_of_parquet_files_and_broken_ones(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(RequestError, match=r"^\S*data has no state\.json"):
        read_prompts(str(folder), DEFAULTS)
    for number in (1, 0):
        write(folder / f"train-{number}.parquet", [{"prompt": f"text {number}"}])
    assert [p.text for p in read_prompts(str(folder), DEFAULTS)] == ["text 0", "text 1"]
    (folder / "train-0.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(RequestError, match="cannot read prompts from"):
        read_prompts(str(folder), DEFAULTS)
    with pytest.raises(RequestError, match="cannot read prompts from"):
        read_prompts(str(tmp_path / "none.parquet"), DEFAULTS)


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "a", "max_new_tokens": 2}, {"prompt": "b", "max_new_tokens": None}])
    table.select([1, 0]).save_to_disk(tmp_path / "one")
    assert [(p.text, p.params.max_new_tokens) for p in read_prompts(str(tmp_path / "one"), DEFAULTS)] == [("b", 128), ("a", 2)]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(RequestError, match=r"holds the splits train, test; give one, for example .*both/train"):
        read_prompts(str(tmp_path / "both"), DEFAULTS)
    assert [p.text for p in read_prompts(str(tmp_path / "both" / "train"), DEFAULTS, column="prompt")] == ["a", "b"]


@pytest.mark.parametrize("text", ['{"prompt": "a"}\n\n{"prompt": "{b"}\n', "a\n\n{b\n"], ids=["JSON lines", "text"])
def test_standard_input(text, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert [p.text for p in read_prompts("-", DEFAULTS)] == ["a", "{b"]


def test_answers_as_a_table(tmp_path):
    """In the order of the prompts, whatever finished first; every kind of record."""
    output = str(tmp_path / "out.parquet")
    token = TokenLogprob(3, -0.5, ((3, -0.5), (4, -2.0)))
    answers = [
        Completion(2, "c", "C\n☃", (5,), "length", 1),
        Completion(0, "a", "A", (3,), "stop", 2, logprobs=(token,)),
        Completion(1, "b", "", (), "error", 0, error="why"),
    ]
    lines = [record(a.id, Prompt("x" if a.id else 7, a.prompt, DEFAULTS), a) for a in answers]
    with open(lines_of(output), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_table(output)
    rows = pq.read_table(output).to_pylist()
    assert [(row["index"], row["id"], row["text"], row["error"]) for row in rows] == [
        (0, "7", "A", None), (1, "x", "", "why"), (2, "x", "C\n☃", None)]  # fmt: skip
    assert rows[0]["logprobs"][0]["top"][1] == {"token_id": 4, "logprob": -2.0} and rows[2]["token_ids"] == [5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.parquet.jsonl"]


def test_batch_answers_are_json_lines():
    asked = types.SimpleNamespace(batch=object())
    with pytest.raises(RequestError, match=r"whose answers are JSON lines; give \.jsonl"):
        check_output("a.parquet", [asked])
