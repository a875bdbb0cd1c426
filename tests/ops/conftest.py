"""Every instruction set of this machine; tests that need the extension are skipped without it."""

import pytest

from specmoe_jax import ops
from specmoe_jax.ops import dispatch


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", ops.isas() or ["none"], indirect=True)


@pytest.fixture
def isa(request, monkeypatch):
    if request.param == "none":
        pytest.skip("the compiled kernels are not usable here")
    monkeypatch.setenv("SPECMOE_ISA", request.param)
    return request.param


@pytest.fixture
def kernels():
    if not ops.isas():
        pytest.skip("the compiled kernels are not usable here")


@pytest.fixture
def xla_alone(monkeypatch):
    """Every op by what an accelerator runs."""
    for kernel, variants in dispatch.KERNELS.items():
        monkeypatch.setitem(dispatch.KERNELS, kernel, {"xla": variants["xla"]})
