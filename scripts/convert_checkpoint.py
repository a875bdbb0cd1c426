"""Converts a checkpoint: Hugging Face, the mappable layout of this library, Orbax, in any direction.

Examples:
    python scripts/convert_checkpoint.py --model=DIR --output=NEW_DIR --format=specmoe
    python scripts/convert_checkpoint.py --model=DIR --output=NEW_DIR --format=orbax
    python scripts/convert_checkpoint.py --model=DIR --write_manifest
A run that was stopped goes on where it was when started again with the same flags.
"""

from _run import run

if __name__ == "__main__":
    run("convert")
