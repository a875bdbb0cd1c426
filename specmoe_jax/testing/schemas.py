"""Random JSON schemas: nested and recursive ones, enums, numbers, Unicode; small, so that random models reach their ends."""

from typing import Any

import numpy as np

WORDS = ("name", "größe", "名前", "🙂", "a b", 'say "x"', "back\\slash", "x/y")
PATTERNS = ("[a-c]{1,3}", "(ja|nein)", "[0-9]{2}-[0-9]{2}", "[α-ω]{1,2}")
DEPTH = 3


def random_schema(seed: int) -> dict[str, Any]:
    """Number `seed`; every third may refer to itself."""
    rng = np.random.default_rng([21, seed])
    schema = _object(rng, DEPTH) if rng.random() < 0.7 else _any(rng, DEPTH)
    if seed % 3 == 0:
        return {"$defs": {"node": _node(rng)}, "type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}, "rest": schema},
                "required": ["tree"], "additionalProperties": False}  # fmt: skip
    return schema


def _node(rng: np.random.Generator) -> dict[str, Any]:
    """Of a tree."""
    children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
    properties = {str(rng.choice(WORDS)): _leaf(rng), "children": children}
    return {"type": "object", "properties": properties, "required": list(properties)[:1], "additionalProperties": False}


def _any(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    kinds = (
        [_leaf]
        if depth == 0
        else [_leaf, lambda rng: _object(rng, depth), lambda rng: _array(rng, depth), lambda rng: _union(rng, depth)]
    )
    return kinds[rng.integers(len(kinds))](rng)


def _object(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    names = [str(name) for name in rng.choice(WORDS, rng.integers(1, 4), replace=False)]
    properties = {name: _any(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    least = int(rng.integers(0, 2))
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + int(rng.integers(0, 3))}


def _union(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth - 1), {"type": "null"}]}


def _leaf(rng: np.random.Generator) -> dict[str, Any]:
    low = int(rng.integers(-50, 50))
    leaves: list[dict[str, Any]] = [
        {"type": "string", "maxLength": int(rng.integers(1, 7))},
        {"type": "string", "minLength": 1, "maxLength": 3},
        {"type": "string", "pattern": f"^{rng.choice(PATTERNS)}$"},
        {"enum": ["rot", "grün", "青", "🟣", low, None, True]},
        {"const": {"fixed": [1, "zwei", "三"]}},
        {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 1000))},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
    ]
    return leaves[rng.integers(len(leaves))]
