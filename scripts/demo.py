"""Shows the point in a minute: the same text without speculation and with it, over an emulated slow link.

Example:
    python scripts/demo.py
"""

from _run import run

if __name__ == "__main__":
    run("demo")
