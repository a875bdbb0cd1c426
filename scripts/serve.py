"""Serves a model over the OpenAI API, with a chat page, on this machine alone unless told otherwise.

Example:
    python scripts/serve.py --model=DIR --preset=specmoe --port=8000
"""

from _run import run

if __name__ == "__main__":
    run("serve")
