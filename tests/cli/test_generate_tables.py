"""Jobs of tables: prompts from a parquet file or standard input, answers to one."""

import io
import types

import pytest

from tests.cli.generate_cases import PROMPTS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HOW = ("--preset=resident", "--max_new_tokens=4", "--ignore_eos")


def test_a_job_of_tables_goes_on_where_it_was_cut(generate, checkpoint, tmp_path):
    pq.write_table(pa.Table.from_pylist([{"text": prompt, "label": 1} for prompt in PROMPTS]), tmp_path / "prompts.parquet")
    command = (f"--model={checkpoint}", "--prompts=prompts.parquet", "--prompt_column=text", *HOW, "--output=out.parquet")
    ran = generate(*command)
    assert ran.code == 0, ran.err
    whole = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["prompt"] for row in whole] == list(PROMPTS) and all(len(row["token_ids"]) == 4 for row in whole)
    lines = (tmp_path / "out.parquet.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.parquet.jsonl").write_bytes(lines[0] + lines[1][:20])  # as `kill -9` leaves it
    (tmp_path / "out.parquet").unlink()
    again = generate(*command)
    assert again.code == 0 and "1 of 4 prompts were done before" in again.err
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == whole
    assert not list(tmp_path.glob("*.partial"))
    changed = generate(*(flag.replace("=4", "=5") for flag in command))
    assert changed.code == 1 and "was begun with other prompts" in changed.err


def test_flags_of_tables_that_do_not_fit(generate, checkpoint, monkeypatch, tmp_path):
    model = f"--model={checkpoint}"
    assert "--prompt_column has no effect without --prompts" in generate(model, "--prompt=a", "--prompt_column=b", *HOW).err
    batch = b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}\n'
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(batch)))
    ran = generate(model, "--prompts=-", *HOW, "--output=out.parquet")
    assert ran.code == 1 and "whose answers are JSON lines" in ran.err and not list(tmp_path.iterdir())
