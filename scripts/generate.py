"""Generates text with a Mixture-of-Experts model whose experts stay in host memory.

Example:
    python scripts/generate.py --prompt="Call me Ishmael." --preset=specmoe --max_new_tokens=64
"""

from _run import run

if __name__ == "__main__":
    run("generate")
