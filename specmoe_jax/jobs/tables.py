"""Prompts and answers as tables: parquet files, and Hugging Face datasets on disk.

Answers as parquet are made of the job's JSON lines once all of them are there, so a job of either form survives the same faults.
"""

import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence, Set
from typing import Any, BinaryIO

from specmoe_jax.support.atomic_files import replacing
from specmoe_jax.support.errors import RequestError

SUFFIX = ".parquet"
ROWS_AT_ONCE = 1000
_NEEDS_LIBRARY = 'needs the library {}: pip install "specmoe_jax[data]"'
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"  # of Dataset.save_to_disk, and of DatasetDict's


def is_table(path: str) -> bool:
    """Whether prompts are rows there, not lines."""
    return path.endswith(SUFFIX) or os.path.isdir(path)


def read_rows(path: str, column: str | None) -> Iterator[dict[str, Any]]:
    """Rows as the fields of JSON lines, without what is null. Raises RequestError.

    column: the one that holds texts, token ids or messages, the others but `id` are left out; None: each is a field of that name.
    """
    try:
        rows = _dataset_rows(path, column) if os.path.isdir(path) else _parquet_rows([path], column)
        yield from (_fields(row, column) for row in rows)
    except ImportError as e:
        raise RequestError(f"{path} {_NEEDS_LIBRARY.format(e.name)}") from None
    except RequestError:
        raise
    except (OSError, ValueError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise RequestError(f"cannot read prompts from {path} ({reason}); give a parquet file or a dataset") from e


def _parquet_rows(files: list[str], column: str | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for file in files:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _chosen(table.schema_arrow.names, column, file)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()


def _dataset_rows(path: str, column: str | None) -> Iterator[dict[str, Any]]:
    """Of Dataset.save_to_disk, or of a folder with parquet files, as the hub keeps datasets."""
    folder = pathlib.Path(path)
    if (folder / _SPLITS_FILE).exists():
        splits = json.loads((folder / _SPLITS_FILE).read_text(encoding="utf-8")).get("splits", [])
        raise RequestError(
            f"{path} holds the splits {', '.join(splits)}; give one, for example {folder / (splits or ['train'])[0]}"
        )
    if not (folder / _STATE_FILE).exists():
        files = sorted(map(str, folder.glob(f"*{SUFFIX}")))
        if not files:
            raise RequestError(f"{path} has no {_STATE_FILE}, as a saved dataset has, and no *{SUFFIX}; give a folder with one")
        yield from _parquet_rows(files, column)
        return
    import datasets  # pyright: ignore[reportMissingImports]

    table: Any = datasets.load_from_disk(path)  # one split: several were refused above
    chosen = _chosen(table.column_names, column, path)
    table = table if chosen is None else table.select_columns(chosen)
    yield from table


def _chosen(names: list[str], column: str | None, path: str) -> list[str] | None:
    if column is None:
        return None
    if column not in names:
        raise RequestError(f"{path} has no column {column!r}; its columns are {', '.join(names)}")
    return [column, *(["id"] if "id" in names and column != "id" else [])]


def _fields(row: dict[str, Any], column: str | None) -> dict[str, Any]:
    fields = without_nulls(row)
    if column is None or column not in fields:
        return fields
    value = fields.pop(column)
    of_messages = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return fields | {"messages" if of_messages else "prompt": value}


def without_nulls(value: Any) -> Any:
    """The fields of a row without those that are null, at any depth: a table gives every row each field of any row."""
    if isinstance(value, dict):
        return {key: without_nulls(own) for key, own in value.items() if own is not None}
    return [without_nulls(own) for own in value] if isinstance(value, list) else value


def as_table(output: str | None) -> bool:
    """Whether answers are to be a table."""
    return output is not None and output.endswith(SUFFIX)


def lines_of(output: str) -> str:
    """The file of JSON lines that a job appends to: the output itself, or the one beside a table."""
    return f"{output}.jsonl" if as_table(output) else output


def check_output(output: str, prompts: Sequence[Any]) -> None:
    """Raises RequestError where answers to these prompts cannot become a table."""
    if importlib.util.find_spec("pyarrow") is None:
        raise RequestError(f"--output={output} {_NEEDS_LIBRARY.format('pyarrow')}")
    if any(prompt.batch for prompt in prompts):
        raise RequestError(
            f"--output is {output} and prompts are in the OpenAI batch form, whose answers are JSON lines; give .jsonl"
        )


def write_table(output: str) -> None:
    """The answers of a job, in the order of their prompts, as the table that --output asks for; nothing for JSON lines."""
    if not as_table(output):
        return
    import pyarrow
    import pyarrow.parquet

    lines_file = lines_of(output)
    with replacing(output) as file, open(lines_file, "rb") as lines:
        order = in_order(lines)
        records = (_record(lines, place) for place in order)
        schema = _schema(set().union(*records))
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            rows = (_row(_record(lines, place), schema.names) for place in order)
            while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
                writer.write_table(pyarrow.Table.from_pylist(some, schema))


def table_of(lines_file: str) -> Any:
    """The answers of a job as a table in memory, in the order of the prompts and with every column that answers may have."""
    import pyarrow

    schema = _schema()
    with open(lines_file, "rb") as lines:
        rows = [_row(_record(lines, place), schema.names) for place in in_order(lines)]
    return pyarrow.Table.from_pylist(rows, schema)


def _schema(names: Set[str] | None = None) -> Any:
    """The columns of these names (None: all) that answers have, of types that do not depend on the records."""
    import pyarrow as pa

    logprob = [("token_id", pa.int32()), ("logprob", pa.float64())]
    tokens = pa.list_(pa.struct([*logprob, ("top", pa.list_(pa.struct(logprob)))]))
    types = {
        "index": pa.int64(), "id": pa.string(), "prompt": pa.string(), "text": pa.string(), "token_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(), "num_prompt_tokens": pa.int64(), "num_new_tokens": pa.int64(), "error": pa.string(),
        "logprobs": tokens, "prompt_logprobs": tokens, "channels": pa.map_(pa.string(), pa.string()),
    }  # fmt: skip
    return pa.schema([(name, kind) for name, kind in types.items() if names is None or name in names])


def in_order(lines: BinaryIO) -> list[int]:
    """The places of a job's answers in their file, in the order of the prompts."""
    return [place for _, place in sorted((json.loads(line)["index"], place) for place, line in _places(lines))]


def _places(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while True:
        place, line = lines.tell(), lines.readline()
        if not line:
            return
        yield place, line


def _record(lines: BinaryIO, place: int) -> dict[str, Any]:
    lines.seek(place)
    return json.loads(lines.readline())


def _row(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Ids as texts, since some may be numbers; pairs by name."""
    record["id"] = str(record["id"])
    for name in ("logprobs", "prompt_logprobs"):
        for token in record.get(name) or ():
            token["top"] = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token["top"]]
    if "channels" in record:
        record["channels"] = list(record["channels"].items())
    return {name: record.get(name) for name in names}
