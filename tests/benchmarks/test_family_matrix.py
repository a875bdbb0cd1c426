"""The study of all combinations: none is left out, a file is gone on with, and what is unlike is told apart from a tie."""

import itertools

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.benchmarks.studies import family_matrix
from specmoe_jax.benchmarks.studies.family_matrix import DRAFTED, FAMILIES, PARAMS, PLACES, WIDTH, Case, Found
from specmoe_jax.config.registry import DRAFTS, KV_TIERS


def test_every_combination_is_asked_for_once():
    """Each round has all presets and drafts, and within one, and from one to the next, tiers and batches go round."""
    rounds = family_matrix.rounds("mixtral")
    pairs = set(itertools.product(sm.PRESETS, DRAFTED))
    for cases in rounds:
        assert {(case.preset, case.draft) for case in cases} == pairs and len(cases) == len(pairs)
        assert {(case.tier, case.batch) for case in cases} == set(itertools.product(KV_TIERS, PLACES))
    assert len(set(itertools.chain(*rounds))) == 4 * len(pairs)
    possible = {(case.preset, case.draft) for case in itertools.chain(*rounds) if family_matrix.refusal(case) is None}
    assert {(case.preset, case.draft) for case in rounds[0] if family_matrix.refusal(case) is None} == possible


def test_every_draft_that_needs_no_code_of_the_user_is_in_it():
    assert {name.split()[0] for name in DRAFTED} == set(DRAFTS) - {"custom"}


def test_refusals_are_the_plans_own_and_the_others_differ():
    """Of a family with such a layer; the preset's name alone makes no other case."""
    assert "keeps the KV cache in host memory" in family_matrix.refusal(Case("glm4_moe", "streaming", "mtp", "accelerator", 8))
    assert "has 0 (num_nextn" in family_matrix.refusal(Case("mixtral", "on_demand", "mtp hot", "host", 1))
    assert family_matrix.refusal(Case("glm4_moe", "streaming", "mtp hot", "host", 1)) is None
    plans = [family_matrix.what_runs(Case("glm4_moe", preset, "mtp", "host", 8)) for preset in ("on_demand", "specmoe", "caching")]
    assert plans[0] == plans[1] != plans[2]


@pytest.fixture
def counted(monkeypatch):
    """Cases that would be run."""
    run = []

    def noted(case, plan):
        run.append(case)
        return Found("unequal", "prompt 0, token 1") if case.draft == "ngram" else Found("equal", accepted=0.5)

    monkeypatch.setattr(family_matrix, "run", noted)
    return run


def test_a_file_is_gone_on_with_and_the_table_has_all(counted, tmp_path):
    output = tmp_path / "matrix.jsonl"
    whole = family_matrix.study(["olmoe"], output)
    assert len(whole) == 280 and len(counted) < 200
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines[:150]) + "\n")
    before = len(counted)
    assert family_matrix.study(["olmoe"], output) == whole
    assert 0 < len(counted) - before < before
    table = family_matrix.table(whole, ["olmoe", "mixtral"]).splitlines()
    assert all(len(line) <= WIDTH for line in table)
    assert table[2].split() == ["mixtral", "0", "0", "0", "0", "0", "280"]
    family, *counts = table[1].split()
    assert (
        family == "olmoe"
        and sum(map(int, counts)) == 280
        and int(counts[3]) == sum(found.outcome == "unequal" for found in whole.values())
    )
    assert any("unequal, olmoe resident ngram" in line for line in table)


def test_equal_tokens_and_a_difference_with_the_logits_it_has(monkeypatch):
    """One real case, and then with a wrong token in the reference."""
    case = Case("olmoe", "on_demand", "ngram", "accelerator", 1)
    found = family_matrix.run(case, family_matrix.plan_of(case))
    assert found.outcome == "equal" and found.accepted is not None
    right = family_matrix.reference("olmoe")
    assert [len(tokens) for tokens in right] == [params.max_new_tokens for params in PARAMS]
    wrong = [((tokens[0] + 1) % 131, *tokens[1:]) for tokens in right]
    monkeypatch.setattr(family_matrix, "reference", lambda family: wrong)
    found = family_matrix.run(case, family_matrix.plan_of(case))
    assert found.outcome == "unequal" and f"token 0: {right[0][0]} instead of {wrong[0][0]}, whose logits" in found.why


def test_the_nearest_logits_are_a_tie(monkeypatch):
    logits = np.zeros((3, 131), np.float32)
    logits[1, 7] = 0.9 * family_matrix.NEAR
    monkeypatch.setattr(family_matrix, "logits_of", lambda *_: logits)
    model = family_matrix.model_of("olmoe")
    assert family_matrix.difference(model, 0, (5, 6, 1), (5, 7, 1)).outcome == "tie"
    logits[1, 7] = 1.1 * family_matrix.NEAR
    assert family_matrix.difference(model, 0, (5, 6, 1), (5, 7, 1)).outcome == "unequal"
    assert set(FAMILIES) >= {"olmoe", "nllb_moe", "qwen3_vl_moe"}
