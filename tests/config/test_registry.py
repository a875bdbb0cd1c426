"""Registries of choices: names, halves that load on first use, and the error for an unknown name."""

import pytest

from specmoe_jax.config.registry import Choice, Registry
from specmoe_jax.support.errors import PlanError

JSON = Choice("json:loads", "json:dumps")


def test_halves_load_by_name():
    import json

    registry = Registry("colour", {"red": JSON})
    assert list(registry) == ["red"] and "red" in registry and "blue" not in registry
    assert registry.description("red") is json.loads
    assert registry.executor("red") is json.dumps


def test_an_unknown_name_is_told_the_names():
    with pytest.raises(PlanError, match="colour is 'blue'; it must be one of red, green"):
        Registry("colour", {"red": JSON, "green": JSON}).description("blue")


def test_a_name_is_registered_once_and_can_be_taken_back():
    registry = Registry("colour", {})
    registry.register("red", JSON)
    with pytest.raises(PlanError, match="colour=red is registered already"):
        registry.register("red", JSON)
    registry.unregister("red")
    assert "red" not in registry
