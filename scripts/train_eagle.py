"""Trains an EAGLE head for a checkpoint, resumes, and measures how much of what it drafts is accepted.

    python scripts/train_eagle.py --text=DATA/train.npy --held_out=DATA/held_out/novels.npy --work_dir=RUN --export_dir=HEAD

Texts are .npy files of token ids (what scripts/witness_data.py writes) or .txt files, which the model's tokenizer encodes.
The target's hidden states come from the engine batch by batch and are never stored. The order of the batches
depends on the seed and the step alone; a run that is started again goes on from its newest checkpoint under RUN.
"""

from _run import run

if __name__ == "__main__":
    run("train_eagle")
