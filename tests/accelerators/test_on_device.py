"""On a machine with an accelerator: every flow gives the tokens of the CPU, float32 at the highest precision.

Skipped where JAX has no accelerator; SPECMOE_DEVICE_TEST=cpu runs the same code on the CPU.
"""

import os

import jax
import pytest

from specmoe_jax.benchmarks.gpu import exact

ANYWHERE = os.environ.get("SPECMOE_DEVICE_TEST") == "cpu"


@pytest.fixture(scope="module")
def found():
    if jax.devices()[0].platform == "cpu" and not ANYWHERE:
        pytest.skip("needs an accelerator; SPECMOE_DEVICE_TEST=cpu runs it on the CPU")
    return list(exact.rows())


def test_every_flow_ran(found):
    assert [row for row in found if row["question"] == "failure"] == []
    assert [row["flow"] for row in found if row["question"] == "exact"] == list(exact.FLOWS)


def test_tokens_are_those_of_the_cpu_or_two_logits_tie(found):
    wrong = [row for row in found if row["question"] == "exact" and not (row["exact"] or row["only_ties"])]
    assert wrong == []
    if jax.devices()[0].platform == "cpu":
        assert all(row["exact"] for row in found if row["question"] == "exact")
