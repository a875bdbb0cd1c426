"""Small tasks for lm-evaluation-harness whose data is made here: multiple choice, perplexity and generation.

A task of one's own is such a dictionary, or the same as a YAML file in the folder of `--include_path`.
"""

import json
import pathlib


def write_tasks(folder: pathlib.Path, text: str, *, count: int = 8) -> list[dict]:
    """Tasks over pieces of a text, their data as JSON lines in `folder`."""
    words = text.split()
    pieces = [words[start : start + 40] for start in range(0, 40 * count, 40)]
    choices = [
        {
            "question": " ".join(piece[:30]),
            "choices": [" ".join(piece[30:34]), " ".join(reversed(piece[30:34])), piece[33], piece[0] + " " + piece[1]],
            "answer": 0,
        }
        for piece in pieces
    ]
    return [
        {
            "task": "continue_choice",
            **_data(folder, "choice", choices),
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "continue_perplexity",
            **_data(folder, "perplexity", [{"page": " ".join(piece * 3)} for piece in pieces]),
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            "task": "continue_text",
            **_data(folder, "text", [{"begin": " ".join(piece[:20]), "end": " " + piece[20]} for piece in pieces]),
            "output_type": "generate_until",
            "doc_to_text": "{{begin}}",
            "doc_to_target": "{{end}}",
            "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def _data(folder: pathlib.Path, name: str, records: list[dict]) -> dict:
    """The part of a task that says where its data is."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
