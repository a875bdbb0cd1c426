"""Joins the answers of a job's shards (scripts/generate.py --shard) into one output in the order of the prompts.

Example:
    python scripts/merge_outputs.py --output=answers.jsonl
"""

from _run import run

if __name__ == "__main__":
    run("merge_outputs")
