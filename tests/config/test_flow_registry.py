"""Every registered expert flow and KV tier offers both of its halves, and nothing else in the package looks at their names."""

import ast
import dataclasses
import inspect
import pathlib

import pytest

import specmoe_jax
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS, KV_TIERS, Choice
from specmoe_jax.engine.flows import protocol as executors
from specmoe_jax.planner.flows import protocol as descriptions
from specmoe_jax.support.errors import PlanError

PACKAGE = pathlib.Path(specmoe_jax.__file__).parent
OWNERS = ("flows", "drafts")  # folders that may read the names
FIELDS = ("config/plan_fields.py",)  # which looks the objects up
OWN = dataclasses.replace(EXPERT_FLOWS.description("resident"), name="own")


def asked(protocol: type) -> set[str]:
    """Names of what a protocol asks for."""
    found = set()
    for base in protocol.__mro__:
        if base.__module__.startswith("specmoe_jax."):
            found |= set(base.__annotations__) | {name for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name for name in found if not name.startswith("_")}


def signature(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", list(EXPERT_FLOWS))
def test_a_flow_has_both_halves(name):
    flow, executor = EXPERT_FLOWS.description(name), EXPERT_FLOWS.executor(name)
    assert flow.name == name
    protocol = executors.PooledFlowExecutor if hasattr(executor, "target_pass") else executors.ExpertFlowExecutor
    for half, asks in ((flow, descriptions.ExpertFlowDescription), (executor, protocol)):
        for member in asked(asks):
            assert hasattr(half, member), f"{half} lacks {member}"
            if callable(getattr(asks, member, None)):
                assert signature(getattr(half, member)) == signature(getattr(asks, member)), member
                assert getattr(half, member).__module__ != asks.__module__, f"{half} does not implement {member}"


@pytest.mark.parametrize("name", list(KV_TIERS))
def test_a_tier_has_both_halves(name):
    tier, executor = KV_TIERS.description(name), KV_TIERS.executor(name)
    assert tier.name == name and isinstance(tier.on_host, bool)
    for member in asked(executors.KvTierExecutor):
        assert signature(getattr(executor, member)) == signature(getattr(executors.KvTierExecutor, member)), member


def test_what_is_asked_is_found():
    assert {"name", "check", "time_pass"} <= asked(descriptions.ExpertFlowDescription)
    assert {"run_pass", "target_pass"} <= asked(executors.PooledFlowExecutor)


def test_a_plan_knows_its_flow_and_tier():
    plan = Plan(preset="p", expert_flow="stream", kv_tier="host")
    assert plan.flow is EXPERT_FLOWS.description("stream") and plan.cache_tier is KV_TIERS.description("host")


def test_a_flow_can_be_added():
    EXPERT_FLOWS.register("own", Choice(f"{__name__}:OWN", "specmoe_jax.engine.flows.resident:FLOW"))
    try:
        assert Plan(preset="p", expert_flow="own").flow.all_resident
    finally:
        EXPERT_FLOWS.unregister("own")
    with pytest.raises(PlanError, match="expert_flow is 'own'; it must be one of resident, on_demand, stream"):
        Plan(preset="p", expert_flow="own").flow  # noqa: B018 (raises)


def test_a_description_goes_by_the_registered_name():
    EXPERT_FLOWS.register("other", Choice(f"{__name__}:OWN", "specmoe_jax.engine.flows.resident:FLOW"))
    try:
        with pytest.raises(PlanError, match="expert_flow=other is registered with a description named 'own'; give both one name"):
            Plan(preset="p", expert_flow="other").flow  # noqa: B018 (raises)
    finally:
        EXPERT_FLOWS.unregister("other")


@pytest.mark.parametrize("field", ["expert_flow", "kv_tier"])
def test_only_the_owners_read_the_names(field):
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if set(inside.parts) & set(OWNERS) or inside.as_posix() in FIELDS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr == field), f"{path}:{node.lineno} reads {field}"


@pytest.mark.parametrize("field", ["expert_flow", "kv_tier", "draft"])
def test_nothing_compares_the_names_of_a_plan(field):
    """A message may say a name; what depends on it is asked of the object that goes by it. `draft` is also what a Runtime holds."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):  # of None
                continue
            for side in (node.left, *node.comparators):
                read = isinstance(side, ast.Attribute) and side.attr == field
                assert not read, f"{path}:{node.lineno} compares {field}"
