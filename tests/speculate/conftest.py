import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """An implicit promotion of dtypes is an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield
