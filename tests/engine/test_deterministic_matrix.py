"""Deterministic sampling: one set of tokens for speculation on or off x batch 1, 7, 16 x two presets x a resume."""

import pytest

import specmoe_jax as sm
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.testing import TINY

PROMPTS = {
    i: Prompt(
        id=f"r{i}",
        text="Call me Ishmael. "[: 1 + i],
        params=sm.SamplingParams(max_new_tokens=4 + i % 7, temperature=0.7 + 0.1 * (i % 4), top_p=0.95, seed=i % 3),
    )
    for i in range(17)
}
# Two presets, each with speculation off and on.
PLANS = {
    "resident": sm.PRESETS["resident"](TINY),
    "resident, ngram": sm.PRESETS["resident"](TINY).replace(draft="ngram", draft_length=3),
    "specmoe": sm.PRESETS["specmoe"](TINY).replace(draft_experts=3, draft_length=3),
    "specmoe, draft=none": sm.PRESETS["specmoe"](TINY).replace(draft="none", draft_length=None, draft_experts=None),
}


class Stop(Exception):
    """Ends a job in the middle."""


def run_job(model, plan, output, *, stop_after=None):
    """The output's lines, sorted. stop_after: requests after which the job is cut off, in the middle of a batch."""
    engine = sm.Engine(model, plan)
    journal = Journal(str(output), jobs.fingerprint(list(PROMPTS.values()), plan, checkpoint_path("demo")))
    todo = {index: prompt for index, prompt in PROMPTS.items() if index not in journal.done}

    def on_event(event):
        if stop_after is not None and len(journal.done) >= stop_after:
            raise Stop

    try:
        with JobWatch(engine, [prompt.params.max_new_tokens for prompt in todo.values()]) as watch:
            jobs.run_job(engine, todo, journal, watch, on_event=on_event)
    except Stop:
        assert 0 < len(journal.done) < len(PROMPTS)
    finally:
        journal.close()
    return sorted(output.read_bytes().splitlines())


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    plan = PLANS["specmoe, draft=none"].replace(batch_size=4, deterministic_sampling=True)
    return run_job(model, plan, tmp_path_factory.mktemp("whole") / "out.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 16])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed"])
def test_the_same_file(model, expected, tmp_path, name, batch_size, resumed):
    plan = PLANS[name].replace(batch_size=batch_size, deterministic_sampling=True)
    if resumed:  # by the plan's opposite: begun with another batch and preset, as the fingerprint allows
        other = PLANS["resident" if "specmoe" in name else "specmoe"].replace(batch_size=5, deterministic_sampling=True)
        run_job(model, other, tmp_path / "out.jsonl", stop_after=6)
    assert run_job(model, plan, tmp_path / "out.jsonl") == expected


@pytest.mark.slow
def test_another_seed_is_another_file(model, expected, tmp_path, monkeypatch):
    """The equality above is not that of a constant."""
    prompt = PROMPTS[9]
    monkeypatch.setitem(PROMPTS, 9, prompt._replace(params=sm.SamplingParams(max_new_tokens=8, temperature=0.8, seed=99)))
    assert run_job(model, PLANS["specmoe"].replace(deterministic_sampling=True), tmp_path / "out.jsonl") != expected
