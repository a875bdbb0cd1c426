"""How layers become programs changes no token: how many belong to one, and what is computed once for all that read it."""

import jax
import pytest
from engine_cases import GREEDY, SAMPLED, plan, run

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.engine.flows import resident_programs
from specmoe_jax.models import basics
from specmoe_jax.testing import eagle_head
from specmoe_jax.testing.families import tiny_family

PROMPTS = [(9, 2, 3), (4, 5)]
CASES = {
    "plain": {},
    "chain": {"draft": "ngram", "draft_length": 2},
    "tree": {"draft": "eagle", "draft_length": 2, "draft_tree_top_k": 2, "draft_tree_tokens": 4},
}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_layers_of_a_program_change_no_token(model, monkeypatch, case, params):
    a_plan, options = plan("resident", **CASES[case]), {"draft_head": eagle_head(model)} if case == "tree" else {}
    whole, _ = run(model, a_plan, PROMPTS, params, **options)
    monkeypatch.setattr(resident_programs, "LAYERS_PER_PROGRAM", 2)
    assert run(model, a_plan, PROMPTS, params, **options)[0] == whole


def greedy(family):
    model = tiny_family(family)
    a_plan = PRESETS["resident"](model.config).replace(batch_size=2)
    completions = Engine(model, a_plan).generate(PROMPTS, SamplingParams(max_new_tokens=7, ignore_eos=True))
    return [one.token_ids for one in completions]


@pytest.mark.parametrize("family", ["granite_moe", "nllb_moe"])
def test_layers_of_a_family(family, monkeypatch):
    """Of embeddings with a scale or places of sinusoids, and of layers that attend a source too."""
    tokens = greedy(family)
    monkeypatch.setattr(resident_programs, "LAYERS_PER_PROGRAM", 1)
    assert greedy(family) == tokens


@pytest.fixture
def few_results(monkeypatch):
    """Sets up to how many results are left to the fusions. Programs that were compiled otherwise are dropped."""

    def choose(count: int) -> None:
        monkeypatch.setattr(basics, "FEW_RESULTS", count)
        jax.clear_caches()

    yield choose
    jax.clear_caches()


@pytest.mark.parametrize("family", ["glm_moe_dsa", "gpt_oss", "qwen3_next", "llama4"])
def test_cosines_that_are_computed_once(family, few_results):
    """Of latent attention and its indexer, of scaled and of partial rotations, of layers without any."""
    few_results(0)
    tokens = greedy(family)
    few_results(10**9)
    assert greedy(family) == tokens
