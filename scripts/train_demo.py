"""Trains the demo model, resumes, evaluates and exports it as a Hugging Face Mixtral checkpoint.

    python scripts/demo_data.py --data_dir=DATA
    python scripts/train_demo.py --data_dir=DATA --work_dir=RUN --export_dir=DEMO

The order of the batches depends on the seed and the step alone; a run that is started again continues from
its newest Orbax checkpoint under RUN and gives the same weights as one that was never stopped.
"""

from _run import run

if __name__ == "__main__":
    run("train_demo")
