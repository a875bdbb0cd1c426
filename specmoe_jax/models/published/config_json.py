"""Reading a config.json: every value checked, every refusal one line that says what was got and what is built."""

from typing import Any

from specmoe_jax.support.errors import CheckpointError

MAX_SIZE = 1 << 31  # of any number; more is a mistake or an attack
MAX_LAYERS = 1 << 12  # layers are counted one by one before a tensor is looked at


def size(raw: dict, *keys: str, default: int | None = None) -> int:
    """A whole number of at least 1 under the first of the keys that is there and not null."""
    key = next((key for key in keys if raw.get(key) is not None), keys[0])
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < MAX_SIZE:
        raise CheckpointError(f"config.json: {key} is {show(value)}; it must be a whole number of at least 1")
    return value


def num_layers(raw: dict, key: str = "num_hidden_layers") -> int:
    """How many layers, bounded."""
    count = size(raw, key)
    if count > MAX_LAYERS:
        raise CheckpointError(f"config.json: {key} is {count}; it must be at most {MAX_LAYERS}")
    return count


def number(raw: dict, key: str, default: float) -> float:
    """A finite number; the default where it is absent or null."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise CheckpointError(f"config.json: {key} is {show(value)}; it must be a finite number")
    return float(value)


def positive(raw: dict, key: str, default: float) -> float:
    """A finite number above 0; the default where it is absent or null."""
    value = number(raw, key, default)
    if value <= 0:
        raise CheckpointError(f"config.json: {key} is {value}; it must be above 0")
    return value


def flag(raw: dict, key: str, default: bool = False) -> bool:
    """A truth value; the default where it is absent or null."""
    value = raw.get(key)
    return default if value is None else bool(value)


def require(raw: dict, key: str, built: Any, *, default: Any = None) -> None:
    """Refuses any other value than the one that this family is built with."""
    value = raw.get(key, default if default is not None else built)
    if value != built:
        raise CheckpointError(f"config.json: {key} is {show(value)}; this family is built with {built!r}")


def window(raw: dict, key: str = "sliding_window") -> int | None:
    """A number of positions or null."""
    return None if raw.get(key) is None else size(raw, key)


def layer_numbers(raw: dict, key: str) -> tuple[int, ...]:
    """A list of whole numbers; absent or null is empty."""
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        raise CheckpointError(f"config.json: {key} is {show(value)}; it must be a list of whole numbers")
    return tuple(value)


def layer_types(raw: dict, count: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """One of the known names for each layer; None where the config leaves it out."""
    return named_layers(raw, "layer_types", count, known)


def named_layers(raw: dict, key: str, count: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """`layer_types` of any key."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or any(name not in known for name in value):
        raise CheckpointError(f"config.json: {key} is {show(value)}; this family is built with {count} of {', '.join(known)}")
    return tuple(value)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """eos_token_id: one, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def token_id(raw: dict, key: str, default: int) -> int:
    """One id of the vocabulary; the default where it is absent or null."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size(raw, "vocab_size"):
        raise CheckpointError(f"config.json: {key} is {show(value)}; it must be an id of the vocabulary")
    return value


def head_dim(raw: dict, hidden: int, num_heads: int) -> int:
    """head_dim, or what hidden_size leaves each head. Even, because rotary positions go by pairs."""
    dim = size(raw, "head_dim", default=max(1, hidden // num_heads))
    if dim % 2:
        raise CheckpointError(f"config.json: head_dim is {dim}; rotary embeddings need an even number")
    return dim


def check_choice(raw: dict, num_experts: int, experts_per_token: int) -> None:
    """No more experts a token than there are."""
    if experts_per_token > num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {experts_per_token} is more than the number of experts, {num_experts}"
        )


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Whole groups of query heads."""
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )


def show(value: Any) -> str:
    """A value for a message: printable and short."""
    return repr(value)[:100].encode("ascii", "backslashreplace").decode()
