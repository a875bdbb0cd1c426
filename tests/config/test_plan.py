"""Plans and sampling parameters: what is refused, and that the refusal says what to do."""

import dataclasses
import json
import types
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.config.plan_fields import fields_of_a_plan
from specmoe_jax.config.presets import preset
from specmoe_jax.support.units import GIB
from specmoe_jax.testing import TINY

NAMES = [field.name for field in dataclasses.fields(sm.Plan)]


def plan(name="specmoe", **changes):
    return sm.PRESETS[name](TINY).replace(**changes)


def refusal(a_plan, config=TINY):
    with pytest.raises(sm.PlanError) as e:
        a_plan.validate(config)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", sm.PRESETS)
def test_presets_are_valid_and_survive_json(name):
    if name == "overlap":
        a_plan = plan(name, link_bytes_per_s=1e9)
    else:
        a_plan = plan(name)
    assert a_plan.validate(TINY) is a_plan
    assert sm.Plan.from_json(a_plan.to_json()) == a_plan
    assert a_plan.preset == name == preset(name, TINY).preset


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 128])
@pytest.mark.parametrize("name", ["resident", "on_demand", "caching", "specmoe"])
def test_presets_fit_models_of_any_number_of_experts(name, experts):
    config = dataclasses.replace(TINY, num_experts=experts, experts_per_token=min(2, experts))
    sm.PRESETS[name](config).validate(config)


def test_unknown_preset():
    for ask in (lambda: preset("fast", TINY), lambda: sm.PRESETS["fast"]):
        with pytest.raises(sm.PlanError, match="preset is 'fast'; it must be one of resident, on_demand"):
            ask()
    with pytest.raises(KeyError):
        sm.PRESETS["fast"]
    assert sm.PRESETS.get("fast") is None and "fast" not in sm.PRESETS


# Each option that has no effect under the rest of the plan, and a part of what is said.
WITHOUT_EFFECT = [
    ("on_demand", {"draft_length": 4}, "draft_length=4 has no effect without a draft"),
    ("on_demand", {"draft_experts": 2}, "draft_experts=2 has no effect with draft=none"),
    ("on_demand", {"guard": True}, "guard=True has no effect without a draft"),
    ("on_demand", {"synthetic_acceptance": 0.5}, "synthetic_acceptance=0.5 has no effect without a draft"),
    ("on_demand", {"draft_set": "random"}, "draft_set=random has no effect with draft=none"),
    ("on_demand", {"substitution": "random"}, "substitution=random has no effect with draft=none"),
    ("on_demand", {"draft": "ngram", "draft_length": 2, "draft_experts": 2}, "draft_experts=2 has no effect with draft=ngram"),
    ("on_demand", {"draft": "eagle", "draft_length": 2, "draft_experts": 2}, "draft_experts=2 has no effect with draft=eagle"),
    ("specmoe", {"draft_tree_top_k": 2, "draft_tree_tokens": 4}, "draft_tree_top_k=2 has no effect with draft=self"),
    ("on_demand", {"spare_slots": 3}, "spare_slots=3 has no effect with prefetch=none"),
    ("on_demand", {"prefetch": "draft"}, "prefetch=draft has no effect with draft=none"),
    ("on_demand", {"micro_batches": 2}, "micro_batches=2 has no effect"),
    ("specmoe", {"cached_experts": 2}, "cached_experts=2 has no effect with draft=self"),
    ("specmoe", {"micro_batches": 2}, "micro_batches=2 has no effect"),
    ("specmoe", {"expert_flow": "resident"}, "draft=self has no effect with expert_flow=resident"),
    ("resident", {"link_bytes_per_s": 1e9}, "link_bytes_per_s=1000000000.0 has no effect where every expert is resident"),
    ("resident", {"cached_experts": 1}, "cached_experts=1 has no effect where every expert is resident"),
    ("resident", {"draft_experts": 1}, "draft_experts=1 has no effect"),
    ("resident", {"draft_length": 1}, "draft_length=1 has no effect"),
    ("resident", {"micro_batches": 3}, "micro_batches=3 has no effect"),
]


@pytest.mark.parametrize(("name", "changes", "said"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(name, changes, said):
    assert said in refusal(plan(name, **changes))


WRONG_VALUES = [
    ({"draft": "magic"}, "draft is 'magic'; it must be one of none, self"),
    ({"draft": ["self"]}, "draft is ['self']"),
    ({"kv_tier": "disk"}, "kv_tier is 'disk'; it must be one of accelerator, host"),
    ({"expert_flow": None}, "expert_flow is None"),
    ({"dtype": "float16"}, "dtype is 'float16'; it must be one of float32, bfloat16"),
    ({"draft_length": None}, "draft=self needs a draft_length"),
    ({"draft_length": 0}, "draft_length is 0; it must be a whole number of at least 1"),
    ({"draft_length": 2.0}, "draft_length is 2.0"),
    ({"draft_length": True}, "draft_length is True"),
    ({"draft_experts": None}, "draft_experts is None; draft=self needs 1 to 5"),
    ({"draft_experts": 6}, "draft_experts is 6; draft=self needs 1 to 5"),
    ({"draft_experts": 0}, "draft_experts is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": None}, "batch_size is None"),
    ({"prefill_chunk": None}, "prefill_chunk is None"),
    ({"micro_batches": None}, "micro_batches is None"),
    ({"prefill_chunk": -1}, "prefill_chunk is -1"),
    ({"device_memory_bytes": 0}, "device_memory_bytes is 0; it must be a finite number above 0"),
    ({"device_memory_bytes": float("inf")}, "device_memory_bytes is inf; it must be a finite number"),
    ({"device_memory_bytes": float("nan")}, "device_memory_bytes is nan"),
    ({"host_memory_bytes": "8"}, "host_memory_bytes is '8'"),
    ({"link_bytes_per_s": -1.0}, "link_bytes_per_s is -1.0"),
    ({"guard": "no"}, "guard is 'no'; it must be true or false"),
    ({"synthetic_acceptance": 1.5}, "synthetic_acceptance is 1.5"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG_VALUES)
def test_wrong_values_are_refused(changes, said):
    assert said in refusal(plan(**changes))


def of_its_type(spec, value):
    """Whether a value is of a field's type, said a second time and from the annotations alone."""
    hint = typing.get_type_hints(sm.Plan)[spec.name]
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    plain = {part for part in parts if isinstance(part, type)} | {
        str for part in parts if typing.get_origin(part) is typing.Literal
    }
    if isinstance(value, tuple):
        return any(typing.get_origin(part) is tuple for part in parts) and all(type(v) is int for v in value)
    return type(value) in plain or (type(value) is int and float in plain)


VALUES = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5) | st.sampled_from(["false", "true", "0"])
) | st.one_of(st.lists(st.integers()), st.tuples(st.text()), st.dictionaries(st.text(), st.integers(), max_size=1), st.binary())


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(list(fields_of_a_plan().values())), VALUES)
@example(fields_of_a_plan()["deterministic_sampling"], "false")
@example(fields_of_a_plan()["retain"], "false")
@example(fields_of_a_plan()["retain"], 1)
@example(fields_of_a_plan()["retain"], None)
@example(fields_of_a_plan()["preset"], 3)
@example(fields_of_a_plan()["draft_length"], True)
def test_a_value_of_another_type_is_refused_in_every_field(spec, value):
    if not of_its_type(spec, value):
        said = refusal(plan("on_demand").replace(**{spec.name: value}))
        assert said.startswith(f"{spec.name} is {value!r}; it must be {spec.expected}")


@pytest.mark.parametrize("name", ["deterministic_sampling", "retain", "guard", "bypass_page_cache"])
def test_a_switch_in_a_plan_file_is_true_or_false(name):
    with pytest.raises(sm.PlanError, match=f"{name} is 'false'; it must be true or false"):
        sm.Plan.from_json(json.dumps({"preset": "x", name: "false"}))


def test_every_field_has_help_and_a_default_that_it_accepts():
    for spec in fields_of_a_plan().values():
        assert spec.info.help.endswith(".")
        if spec.name != "preset":
            assert spec.accepts(spec.default), spec.name


# As a release before the version number wrote it.
OLD_FILE = """{
  "preset": "specmoe", "draft": "self", "draft_length": 4, "draft_experts": [2, 1, 2], "draft_tree_top_k": null,
  "draft_tree_tokens": null, "draft_kv_bytes": null, "draft_set": null, "substitution": null, "guard": true,
  "cached_experts": null, "prefetch": "none", "spare_slots": null, "retain": false, "expert_flow": "on_demand",
  "expert_tier": "disk", "dram_policy": "lru", "bypass_page_cache": false, "kv_tier": "accelerator", "batch_size": 16,
  "micro_batches": 1, "layer_buffers": 2, "pinned_layers": null, "prefill_chunk": 64, "prefill_attention": null,
  "deterministic_sampling": false, "dtype": "float32", "expert_dtype": null, "device_memory_bytes": 1073741824.0,
  "host_memory_bytes": 2147483648, "link_bytes_per_s": null, "synthetic_acceptance": null
}"""


def test_a_plan_file_of_before_is_read():
    read = sm.Plan.from_json(OLD_FILE)
    assert read == plan(
        draft_experts=(2, 1, 2), guard=True, expert_tier="disk", dram_policy="lru",
        device_memory_bytes=GIB, host_memory_bytes=2 * GIB,
    )  # fmt: skip
    later = (
        "draft_expert_dtype", "dense_dtype", "draft_top_k", "merge_every", "merge_experts", "draft_stop", "retain_policy",
        "placement", "host_share",
    )  # fmt: skip
    assert json.loads(read.to_json()) == {"version": 1, "devices": 1, "num_processes": 1} | dict.fromkeys(later) | json.loads(
        OLD_FILE
    )


@pytest.mark.parametrize("version", [2, 0, -1, None, "1", 1.0, True])
def test_a_plan_file_of_a_later_release_is_refused(version):
    with pytest.raises(sm.PlanError, match=f"version {version!r}; this release reads versions up to 1"):
        sm.Plan.from_json(json.dumps({"preset": "x", "version": version}))


def test_a_plan_has_no_other_fields():
    with pytest.raises(sm.PlanError, match="a plan has no field draft_len; its fields are preset, draft, "):
        plan(draft_len=3)
    with pytest.raises(sm.PlanError, match="a plan has no field self"):
        plan(self=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=6,
)
ANY_PLAN = st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON).map(json.dumps)
NEAR_PLAN = st.fixed_dictionaries(
    {"preset": st.just("specmoe")}, optional={name: JSON | st.integers(-1, 9) for name in NAMES[1:]}
).map(json.dumps)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text() | ANY_PLAN | NEAR_PLAN)
@example("[" * 100_000)
@example('{"preset": "specmoe", "self": 1}')
@example('{"preset": "specmoe", "device_memory_bytes": Infinity}')
@example('{"preset": "specmoe", "draft": {}}')
@example("1" * 5000)
def test_only_plan_errors_come_out_of_a_plan_file(text):
    try:
        a_plan = sm.Plan.from_json(text).validate(TINY)
    except sm.PlanError as e:
        assert str(e)
    else:
        assert sm.Plan.from_json(a_plan.to_json()) == a_plan


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "5", None, True]),
        ("temperature", [-0.1, float("nan"), float("inf"), "hot", None]),
        ("top_k", [-1, 1.5, 1 << 40, None]),
        ("top_p", [0, 1.1, -1, float("nan"), "0.5"]),
        ("seed", [-1, 1 << 32, 0.5, "1", None]),
        ("stop", ["abc", ("",), (1,), None, ["a"]]),
        ("ignore_eos", ["false", 1, None]),
    ],
)
def test_sampling_parameters_out_of_range(field, values):
    for value in values:
        settings = {"temperature": 1.0, field: value}
        with pytest.raises(sm.RequestError, match=field) as e:
            sm.SamplingParams(**settings)
        assert "\n" not in str(e.value)


def test_sampling_options_without_effect():
    for changes in ({"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(sm.RequestError, match="no effect at temperature 0"):
            sm.SamplingParams(**changes)
        sm.SamplingParams(temperature=0.5, **changes)
