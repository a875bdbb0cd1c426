"""Trains the fine-grained MoE, resumes, and exports it as a Hugging Face glm4_moe checkpoint with its MTP layer.

    python scripts/witness_data.py
    python scripts/train_witness.py                        # constant learning rate, until stopped; again: goes on
    python scripts/train_witness.py --decay_steps=2000 --export_dir=DIR   # finishes a copy of the newest checkpoint

The order of the batches depends on the seed and the step alone. SIGTERM ends a run after the step in progress, saved.
"""

from _run import run

if __name__ == "__main__":
    run("train_witness")
