"""Linear models of measured times: what is linear is found, whatever its scale, and damaged caches are measured again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe_jax.planner.measured.operators import WORK, LinearCost, Operators, Sample, as_table, draft_work, fit

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
    samples = [Sample({"tokens": n}, 1e-4 * n * (2 if n % 2 else 1)) for n in (1, 2, 3, 4, 5, 6)]
    found = fit("post_attention", samples)
    assert all(found(**sample.work) == pytest.approx(sample.seconds) for sample in samples)
    assert found.error > 0.3


def test_what_the_line_misses_is_interpolated_between_the_measured_sizes():
    bumps = {1: 1.3, 4: 1.0, 16: 0.7, 64: 1.0}
    true = LinearCost(("tokens",), 1e-4, (1e-5,), 0.0)
    found = fit("post_attention", [Sample({"tokens": n}, true(tokens=n) * bump) for n, bump in bumps.items()])
    for n, bump in bumps.items():
        assert found(tokens=n) == pytest.approx(true(tokens=n) * bump)
    ratios = dict(found.ratios)
    middle = found(tokens=8) / found.linear({"tokens": 8})
    assert middle == pytest.approx((ratios[4] + ratios[16]) / 2)
    assert found(tokens=256) / found.linear({"tokens": 256}) == pytest.approx(ratios[64])


def test_the_work_of_a_draft():
    work = draft_work(layers=4, length=3, rows=8, context=100, blocks=2, ahead=True, waited=0.5)
    assert (work["calls"], work["call_rows"], work["call_read"], work["call_blocks"]) == (12, 96, 9600, 24)
    assert (work["prefetches"], work["prefetched_rows"], work["waited"]) == (12, 96, 0.5)
    assert draft_work(layers=4, length=3, rows=8, context=100)["prefetches"] == 0


def test_json_round_trip_and_damage():
    cost = LinearCost(("tokens",), 1e-3, (2e-6,), 0.1, "tokens", ((1.0, 1.1), (8.0, 0.9)))
    operators = Operators({name: cost._replace(work=WORK[name], coefficients=(1e-6,) * len(WORK[name])) for name in WORK}, 12, 0.05)
    raw = operators.to_dict()
    assert Operators.from_dict(raw) == operators
    assert all(name in as_table(operators) for name in WORK)
    assert Operators.from_dict({}) is None
    assert Operators.from_dict(raw | {"costs": {"head": raw["costs"]["head"]}}) is None
    assert Operators.from_dict(raw | {"spread": "wide"}) is None
