"""Linear models of measured times: what is linear is found, whatever its scale, and damaged caches are measured again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe_jax.planner.operators import WORK, LinearCost, Operators, Sample, as_table, fit

PASSES = [(rows, new, length) for rows in (1, 4, 16, 64) for new in (1, 5) for length in (48, 448)]
seconds = st.floats(1e-8, 1e-3)


def work(rows, new, length):
    return {"tokens": rows * new, "read": rows * length, "scores": rows * new * length}


@given(constant=st.floats(1e-6, 1e-2), coefficients=st.tuples(seconds, seconds, seconds))
def test_linear_times_are_predicted(constant, coefficients):
    true = LinearCost(WORK["attention"], constant, coefficients, 0.0)
    samples = [Sample(work(*shape), true(**work(*shape))) for shape in PASSES]
    found = fit("attention", samples)
    assert found.error < 1e-4 and min(found.coefficients) >= 0
    unseen = work(8, 3, 200)
    assert found(**unseen) == pytest.approx(true(**unseen), rel=1e-3)


def test_no_work_takes_negative_time():
    samples = [Sample({"tokens": n}, 1e-3 / n) for n in (1, 2, 4, 8)]
    assert fit("post_attention", samples).coefficients == (0.0,)


def test_the_error_is_that_of_shapes_that_were_left_out():
    samples = [Sample({"tokens": n}, 1e-4 * n) for n in (1, 2, 3, 4, 5, 6)]
    samples[-1] = samples[-1]._replace(seconds=1e-2)
    assert fit("post_attention", samples).error > 1e-3


def test_json_round_trip_and_damage():
    cost = LinearCost(("tokens",), 1e-3, (2e-6,), 0.1)
    operators = Operators({name: cost._replace(work=WORK[name], coefficients=(1e-6,) * len(WORK[name])) for name in WORK}, 12, 0.05)
    raw = operators.to_dict()
    assert Operators.from_dict(raw) == operators
    assert all(name in as_table(operators) for name in WORK)
    assert Operators.from_dict({}) is None
    assert Operators.from_dict(raw | {"costs": {"head": raw["costs"]["head"]}}) is None
    assert Operators.from_dict(raw | {"spread": "wide"}) is None
