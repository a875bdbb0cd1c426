"""Whatever is in a prompts file or a plan file: a value, or one line that says what is wrong. Never another exception."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.config.plan import field_names
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.testing import TINY

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
PARAMS = [field.name for field in dataclasses.fields(sm.SamplingParams)]
PROMPT_OBJECTS = st.dictionaries(st.sampled_from(["prompt", "id", *PARAMS, "x"]), VALUES, max_size=6)
GOOD = st.fixed_dictionaries(
    {"prompt": st.text(max_size=9)}, optional={"max_new_tokens": st.integers(-1, 9), "seed": st.integers()}
)
LINES = st.one_of(
    st.binary(max_size=40), PROMPT_OBJECTS.map(lambda o: json.dumps(o).encode()), GOOD.map(lambda o: json.dumps(o).encode())
)
DEFAULTS = sm.SamplingParams()


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINES, max_size=6))
def test_prompts(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        kept = read_prompts(str(path), DEFAULTS, keep_bad=True)
    except sm.RequestError as e:  # not UTF-8, or nothing in it
        assert "\n" not in str(e).split("(")[0]
        return
    text = path.read_text(encoding="utf-8-sig")
    assert len(kept) == sum(bool(line.strip()) for line in text.split("\n"))
    for prompt in kept:
        assert isinstance(prompt.text, str) and isinstance(prompt.params, sm.SamplingParams)
        json.dumps({"id": prompt.id, "text": prompt.text}, ensure_ascii=False).encode()  # a record of it can be written
    bad = [prompt for prompt in kept if prompt.error]
    if bad:
        with pytest.raises(sm.RequestError) as first:
            read_prompts(str(path), DEFAULTS)
        assert str(first.value) == f"{path}: {bad[0].error}"
    else:
        assert read_prompts(str(path), DEFAULTS) == kept


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from([*field_names(), "x"]), VALUES, max_size=5),
    base=st.sampled_from([None, *sm.PRESETS]),
)
def test_plans(fields, base):
    """Also over the fields of a good plan, so that the checks after the first are reached."""
    good = {} if base is None else json.loads(sm.PRESETS[base](TINY).to_json())
    try:
        plan = sm.Plan.from_json(json.dumps(good | fields)).validate(TINY)
    except sm.PlanError as e:
        assert str(e)
        return
    assert sm.Plan.from_json(plan.to_json()) == plan


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=60), VALUES.map(json.dumps)))
def test_plan_texts(text):
    try:
        sm.Plan.from_json(text)
    except sm.PlanError as e:
        assert str(e)
