"""Talks with a model in the terminal: the model's chat template, answers as they come, Ctrl-C ends an answer and not the talk.

Example:
    python scripts/chat.py --model=DIR --preset=specmoe --temperature=0.7
"""

from _run import run

if __name__ == "__main__":
    run("chat")
