"""Registries of the choices in a plan that have behaviour, and the error for a name that is in none.

A choice has two halves under one name. Its description is pure: checks, memory, costs, calibration; it stands in the planner.
Its executor runs it; it stands in the engine. A registry knows both by where they are defined and imports them on first use,
as entry points do, so that a plan can be checked below the rooms that implement it.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from specmoe_jax.support.errors import PlanError


class Choice(NamedTuple):
    """Where the halves of a choice are defined, each as "module:attribute"."""

    description: str
    executor: str


class Registry:
    """The choices of one field of a plan, by name. field: for messages."""

    def __init__(self, field: str, choices: dict[str, Choice]):
        self.field, self._choices = field, dict(choices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._choices

    def register(self, name: str, choice: Choice) -> None:
        """Adds a choice. Raises PlanError if the name is taken."""
        if name in self._choices:
            raise PlanError(f"{self.field}={name} is registered already; choose another name")
        self._choices[name] = choice

    def unregister(self, name: str) -> None:
        """Takes back what `register` added."""
        del self._choices[name]

    def description(self, name: str) -> Any:
        """The pure half. Raises PlanError for an unknown name, and for a half that goes by another one."""
        found = _load(self._choice(name).description)
        own_name = getattr(found, "name", name)  # policies are functions, which have none
        if own_name != name:
            raise PlanError(f"{self.field}={name} is registered with a description named {own_name!r}; give both one name")
        return found

    def executor(self, name: str) -> Any:
        """The half that runs. Raises PlanError for an unknown name."""
        return _load(self._choice(name).executor)

    def _choice(self, name: str) -> Choice:
        if name not in self:
            raise PlanError(f"{self.field} is {name!r}; it must be one of {', '.join(self._choices)}")
        return self._choices[name]


@functools.cache
def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _flow(name: str) -> Choice:
    return Choice(f"specmoe_jax.planner.flows.{name}:FLOW", f"specmoe_jax.engine.flows.{name}:FLOW")


def _draft(module: str) -> Choice:
    return Choice(f"specmoe_jax.planner.drafts.{module}:DRAFT", f"specmoe_jax.engine.drafts.{module}:DRAFT")


EXPERT_FLOWS = Registry("expert_flow", {name: _flow(name) for name in ("resident", "on_demand", "stream", "host_compute")})
KV_TIERS = Registry(
    "kv_tier",
    {
        "accelerator": Choice("specmoe_jax.kv_cache.tiers:ON_ACCELERATOR", "specmoe_jax.engine.flows.kv_tiers:ON_ACCELERATOR"),
        "host": Choice("specmoe_jax.kv_cache.tiers:ON_HOST", "specmoe_jax.engine.flows.kv_tiers:ON_HOST"),
    },
)
DRAFTS = Registry(
    "draft",
    {
        "none": _draft("none"),
        "self": _draft("self_draft"),
        "merged": _draft("merged"),
        "eagle": _draft("eagle"),
        "mtp": _draft("mtp"),
        "ngram": _draft("ngram"),
        "model": _draft("model"),
        "custom": _draft("custom"),
    },
)


def _policy(place: str) -> Choice:
    """A policy is one pure object, which the planner's replay and the engine share."""
    return Choice(place, place)


HOST_CACHE_POLICIES = Registry(
    "dram_policy",
    {
        "lru": _policy("specmoe_jax.offload.host_cache_policies:least_recently_used"),
        "mru": _policy("specmoe_jax.offload.host_cache_policies:most_recently_used"),
        "frequency": _policy("specmoe_jax.offload.host_cache_policies:least_frequently_used"),
        "lfru": _policy("specmoe_jax.offload.host_cache_policies:least_frequently_recently_used"),
        "expected": _policy("specmoe_jax.offload.host_cache_policies:longest_expected_wait"),
    },
)
RETAIN_POLICIES = Registry(
    "retain_policy",
    {
        "usage": _policy("specmoe_jax.offload.retain_policies:USAGE"),
        "lru": _policy("specmoe_jax.offload.retain_policies:LRU"),
        "lfru": _policy("specmoe_jax.offload.retain_policies:LFRU"),
        "expected": _policy("specmoe_jax.offload.retain_policies:EXPECTED"),
        "drafted": _policy("specmoe_jax.offload.retain_policies:DRAFTED"),
    },
)
PLACEMENTS = Registry(
    "placement",
    {
        "modulo": _policy("specmoe_jax.offload.homes:MODULO"),
        "popularity": _policy("specmoe_jax.offload.homes:POPULARITY"),
    },
)
DRAFT_STOPS = Registry("draft_stop", {"union": _policy("specmoe_jax.speculate.row_lengths:UNION")})
DRAFT_SETS = Registry(
    "draft_set",
    {
        "hot_temporal": _policy("specmoe_jax.speculate.hot_experts.policies:hot_temporal"),
        "hot_global": _policy("specmoe_jax.speculate.hot_experts.policies:hot_global"),
        "random": _policy("specmoe_jax.speculate.hot_experts.policies:random_set"),
        "decay": _policy("specmoe_jax.speculate.hot_experts.policies:decayed"),
        "accepted": _policy("specmoe_jax.speculate.hot_experts.policies:accepted_only"),
    },
)
