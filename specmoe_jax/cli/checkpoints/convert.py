"""Converts a checkpoint: Hugging Face, the mappable layout of this library, Orbax, in any direction.

Examples:
    specmoe convert --model=DIR --output=NEW_DIR --format=specmoe
    specmoe convert --model=DIR --output=NEW_DIR --format=specmoe --expert_packing=lossless
    specmoe convert --model=DIR --output=NEW_DIR --format=orbax
    specmoe convert --model=DIR --write_manifest
A run that was stopped goes on where it was when started again with the same flags.
"""

import pathlib

from absl import flags

from specmoe_jax.checkpoints import checkpoint_path, write_manifest
from specmoe_jax.checkpoints.conversion.convert import FORMATS, PACKINGS, convert
from specmoe_jax.cli import common
from specmoe_jax.config.plan_fields import DTYPES

_MODEL = flags.DEFINE_string("model", None, '"demo" (bundled) or a directory: Hugging Face, converted, or Orbax export.')
_OUTPUT = flags.DEFINE_string("output", None, "A new directory for the result.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "specmoe: mapped at load, not copied. huggingface. orbax.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Type of the result. Default: what loses nothing.")
_PACKING = flags.DEFINE_enum(
    "expert_packing", None, PACKINGS, "lossless: bfloat16 experts in 12 bits, bit for bit (format specmoe). Default: as they are."
)
_WRITE_MANIFEST = flags.DEFINE_boolean("write_manifest", False, "Write a sha256 per tensor into the model's directory instead.")


def main() -> None:
    if _MODEL.value is None:
        common.usage_error("--model is missing; --help explains the flags")
    if _WRITE_MANIFEST.value:
        if _OUTPUT.value or _FORMAT.value or _DTYPE.value or _PACKING.value:
            common.usage_error("--write_manifest converts nothing; leave --output, --format, --dtype and --expert_packing out")
        write_manifest(checkpoint_path(_MODEL.value))
        return
    if _OUTPUT.value is None or _FORMAT.value is None:
        common.usage_error("--output and --format are needed (or --write_manifest); --help explains the flags")
    how = {"to": _FORMAT.value, "dtype": _DTYPE.value, "packing": _PACKING.value}
    print(convert(_MODEL.value, pathlib.Path(_OUTPUT.value), **how, progress=True))
