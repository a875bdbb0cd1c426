"""Evaluates a model: tasks of lm-evaluation-harness, or the perplexity of a text file without it.

Examples:
    python scripts/evaluate.py --model=demo --text=book.txt
    python scripts/evaluate.py --model=DIR --tasks=arc_easy --num_fewshot=5 --output=answers.jsonl
"""

from _run import run

if __name__ == "__main__":
    run("evaluate")
