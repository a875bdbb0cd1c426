"""A draft is added by one file a half and one line of the registry: checked, planned, predicted and run like the others."""

import importlib
import sys

import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.autotune import calibrate
from specmoe_jax.config.registry import DRAFTS, Choice
from specmoe_jax.planner.calibration import ASSUMED, Acceptance
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.search import search
from specmoe_jax.planner.workload import Workload
from specmoe_jax.testing import TINY

DESCRIPTION = """
from specmoe_jax.planner.drafts.protocol import DraftDescription
from specmoe_jax.planner.memory.memory_account import DraftMemory

class LastTokenDraft(DraftDescription):
    name = "last_token"
    assumed_acceptance = 0.125

    def memory(self, plan, config, *, head=None, model=None):
        return DraftMemory(row=1000)

DRAFT = LastTokenDraft()
"""
EXECUTOR = '''
import numpy as np
from specmoe_jax.engine.drafts.protocol import DraftExecutor
from specmoe_jax.types import Proposal

class LastTokenDraft:
    """Repeats the last token of each row."""

    def propose(self, view):
        return Proposal(tokens=np.repeat(np.asarray(view.last_token)[:, None], view.length, axis=1), probs=None), view.kv

class LastTokenExecutor(DraftExecutor):
    def make(self, model, plan, inputs):
        return LastTokenDraft()

    def rate_on_text(self, prompt, generated):
        text = (*prompt[-1:], *generated)
        return sum(a == b for a, b in zip(text, text[1:])) / max(len(generated), 1)

DRAFT = LastTokenExecutor()
'''


@pytest.fixture
def last_token(tmp_path, monkeypatch):
    (tmp_path / "last_token_description.py").write_text(DESCRIPTION)
    (tmp_path / "last_token_executor.py").write_text(EXECUTOR)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    DRAFTS.register("last_token", Choice("last_token_description:DRAFT", "last_token_executor:DRAFT"))
    yield
    DRAFTS.unregister("last_token")
    for module in ("last_token_description", "last_token_executor"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("preset", ["resident", "on_demand", "streaming"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_it_is_lossless(last_token, model, preset, params):
    plain = plan(preset, batch_size=4, deterministic_sampling=True)
    drafted, stats = run(model, plain.replace(draft="last_token", draft_length=2), PROMPTS[:4], params)
    assert drafted == run(model, plain, PROMPTS[:4], params)[0]
    assert len(stats["acceptance_by_position"]) == 2 and stats["plan"]["draft"] == "last_token"


def test_it_is_checked(last_token):
    with pytest.raises(sm.PlanError, match="draft=last_token needs a draft_length"):
        plan("on_demand", draft="last_token").validate(TINY)
    for changes in ({"draft_experts": 2}, {"draft_tree_top_k": 2, "draft_tree_tokens": 3}, {"substitution": "random"}):
        with pytest.raises(sm.PlanError, match="has no effect with draft=last_token"):
            plan("on_demand", draft="last_token", draft_length=2, **changes).validate(TINY)
    with pytest.raises(sm.PlanError, match="its gates tell nothing"):
        plan("on_demand", draft="last_token", draft_length=2, prefetch="draft").validate(TINY)


def test_inputs_that_it_does_not_use_are_refused(last_token, model):
    with pytest.raises(sm.PlanError, match="draft=last_token and a draft model given"):
        sm.Engine(model, plan("on_demand", draft="last_token", draft_length=2), draft_model=model)


def test_it_is_accounted_and_predicted(last_token):
    drafted = plan("on_demand", draft="last_token", draft_length=2, batch_size=3)
    memory = drafted.drafting.memory(drafted, TINY)
    own = account(TINY, drafted, batch_rows=3, positions=64, draft=memory)
    assert own.draft_model_bytes == 3000
    work = ASSUMED.workload(Workload(prompt_tokens=8, new_tokens=8), drafted, TINY)
    assert work.acceptance == 0.125
    found = predict(TINY, drafted, machine("a30"), work)
    assert found.draft_s == 0 and found.account.draft_model_bytes == 3000
    assert found.tokens_per_step == pytest.approx(1 + 0.125 + 0.125**2)


def test_it_is_searched(last_token):
    known = ASSUMED._replace(acceptance={"last_token": Acceptance(0.9)})
    work = Workload(prompt_tokens=8, new_tokens=64)

    def evaluate(a_plan):
        return predict(TINY, a_plan, machine("a30"), known.workload(work, a_plan, TINY))

    best = search(TINY, evaluate, requests=4, drafts=("none", "last_token")).best.plan
    assert best.draft == "last_token" and best.draft_length > 1


@pytest.mark.slow
def test_it_is_calibrated(last_token, model, monkeypatch):
    monkeypatch.setattr(calibrate, "NEW_TOKENS", 5)
    found = calibrate.calibrate(model, [PROMPTS[1], PROMPTS[2]], sm.SamplingParams())
    assert set(found.acceptance) == {"self", "ngram", "last_token"}
    assert 0 <= found.acceptance["last_token"].rate <= 1 and not found.acceptance["last_token"].assumed


def test_it_goes_when_it_is_taken_back(model):
    assert "last_token" not in DRAFTS
    with pytest.raises(sm.PlanError, match="draft is 'last_token'; it must be one of none, self"):
        tokens_of(sm.Engine(model, plan("on_demand", draft="last_token", draft_length=2)).generate(PROMPTS[:1], GREEDY))
