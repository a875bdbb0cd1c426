"""Shapes and dtypes of kernel arguments: refused with a message that gives the value and the expected one."""

import jax.numpy as jnp

FLOATS = (jnp.float32, jnp.bfloat16)


def names(dtypes) -> str:
    return " or ".join(jnp.dtype(d).name for d in dtypes)


def array(op: str, name: str, x, shape: tuple, dtypes) -> None:
    """`shape` may hold None for a size that is free."""
    fits = len(x.shape) == len(shape) and all(w is None or g == w for g, w in zip(x.shape, shape, strict=False))
    if not fits:
        want = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, wanted [{want}]")
    if not any(x.dtype == d for d in dtypes):
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, wanted {names(dtypes)}")


def that(op: str, holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"{op}: {message}")
