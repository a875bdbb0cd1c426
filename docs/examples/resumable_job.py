"""A job from a file that may be killed at any moment and goes on when it is started again: as `specmoe generate --output` does.

python docs/examples/resumable_job.py prompts.jsonl answers.jsonl            (run it again after Ctrl-C or kill -9)
"""

import contextlib
import pathlib
import sys

import specmoe_jax as sm
from specmoe_jax.jobs import job
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.jobs.watch import JobWatch


def main(model, prompts_file, output, batch_size=4, new_tokens=32, most=None):
    """-> how many prompts were done before, and how many now. most: stop after so many answers, as an interruption would."""
    prompts = read_prompts(prompts_file, sm.SamplingParams(max_new_tokens=new_tokens), keep_bad=True)
    plan = sm.PRESETS["specmoe"](model.config).replace(batch_size=batch_size)
    engine = sm.Engine(model, plan)
    # The journal refuses an output that another job wrote: other prompts, another model, another dtype.
    identity = job.fingerprint(prompts, plan, model.path)
    with contextlib.closing(Journal(output, identity, requests=len(prompts))) as journal:
        before = len(journal.done)
        todo = job.record_errors(prompts, job.refusals(model, prompts), journal)  # bad lines get records of their own
        with JobWatch(engine, [prompt.params.max_new_tokens for prompt in todo.values()], progress="auto") as watch:
            for completion in job.completions(engine, todo, watch):
                journal.append(job.record(completion.id, todo[completion.id], completion))  # on disk when this returns
                if most is not None and len(journal.done) - before >= most:
                    break
        journal.check_present()
        return before, len(journal.done) - before


if __name__ == "__main__":
    prompts_file, output = sys.argv[1:] if len(sys.argv) == 3 else ("prompts.jsonl", "answers.jsonl")
    if not pathlib.Path(prompts_file).exists():
        pathlib.Path(prompts_file).write_text("".join(f'{{"prompt": "The captain said, number {i}:"}}\n' for i in range(12)))
    before, now = main(sm.load_model("demo"), prompts_file, output)
    print(f"{before} answers were there, {now} were added: {output}")
