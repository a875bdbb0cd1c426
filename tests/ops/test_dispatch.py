"""Which implementation of a kernel runs, and how one is added."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.ops import dispatch
from specmoe_jax.ops.cpu import _ffi

NEW_FILE = """
import jax.numpy as jnp

def fits(x, weight):
    return x.shape[0] == 1

def ones(x, weight):
    return (jnp.ones((x.shape[0], weight.shape[0])),)
"""


def module_in(folder, text):
    (folder / "new_kernel.py").write_text(text)
    spec = importlib.util.spec_from_file_location("new_kernel", folder / "new_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_variant_is_one_file_and_one_line(tmp_path, monkeypatch):
    new = module_in(tmp_path, NEW_FILE)
    line = {"ones": dispatch.Variant(new.ones, "cpu", new.fits)}
    monkeypatch.setitem(dispatch.KERNELS, "dense_product", line | dispatch.KERNELS["dense_product"])
    x, weight = jnp.full((2, 3), 2.0), jnp.full((4, 3), 5.0)
    np.testing.assert_array_equal(ops.dense_product(x[:1], weight), np.ones((1, 4)))
    np.testing.assert_array_equal(ops.dense_product(x, weight), np.full((2, 4), 30))
    lowered = jax.jit(ops.dense_product).trace(x[:1], weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" in lowered  # a variant of one platform leaves the others alone


def test_a_variant_of_every_platform_hides_those_behind_it(monkeypatch):
    line = {"zeros": dispatch.Variant(lambda x, weight: (jnp.zeros((x.shape[0], weight.shape[0])),))}
    monkeypatch.setitem(dispatch.KERNELS, "dense_product", line | dispatch.KERNELS["dense_product"])
    assert not np.any(ops.dense_product(jnp.ones((1, 3)), jnp.ones((4, 3))))


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_the_last_variant_of_a_kernel_takes_everything(kernel):
    last = list(dispatch.KERNELS[kernel].values())[-1]
    assert last.platform is None and last.fits is dispatch.always


def test_compiled_kernels_come_first(kernels):
    for variants in dispatch.KERNELS.values():
        platforms = [variant.platform for variant in variants.values()]
        assert platforms == sorted(platforms, key=lambda platform: platform is None)


PRODUCT = (jnp.ones((1, 1 << 18)),) * 2  # of a MiB, the least that it takes
ATTENTION_OPTIONS = dict(scale=1, window=None, softcap=None, chunk=None)
CASES = {
    "chunked_attention": ((None,) * 9, ATTENTION_OPTIONS),
    "chunked_attention_packed": ((None,) * 9, ATTENTION_OPTIONS),
    "expert_ffn": ((None,) * 3, dict(ffn=None, packing=None, hidden=None, numbers={})),
    "dense_product": (PRODUCT, {}),
    "packed_product": ((*PRODUCT, jnp.ones(1)), {}),
    "put_rows": ((None,) * 3, {}),
    "put_row": ((jnp.ones((2, 3)), jnp.ones(3), None), {}),
    "append": ((None,) * 4, {}),
}


@pytest.mark.parametrize("kernel", CASES)
def test_no_compiled_kernel_is_chosen_where_they_are_switched_off(kernels, monkeypatch, kernel):
    arrays, options = CASES[kernel]
    variant = dispatch.KERNELS[kernel]["cpu"]
    assert variant.fits(*arrays, **options)
    monkeypatch.setattr("specmoe_jax.ops.cpu._ffi.module", lambda: None)
    assert not variant.fits(*arrays, **options)


def test_every_compiled_kernel_has_a_case():
    assert set(CASES) == {kernel for kernel, variants in dispatch.KERNELS.items() if "cpu" in variants}


def test_missing_kernels_name_their_cause(tmp_path, monkeypatch):
    """A source tree in the working directory hides the installed package: that is no matter of a compiler."""
    assert _ffi.how_to_have_them(tmp_path).startswith("reinstall specmoe_jax with a C++ compiler")
    (tmp_path / "cpu_ops").mkdir()

    class Installed:
        def locate_file(self, _):
            return "/site-packages"

    monkeypatch.setattr(_ffi.importlib.metadata, "distribution", lambda _: Installed())
    said = _ffi.how_to_have_them(tmp_path)
    assert f"took the source tree {tmp_path}, not the package installed in /site-packages" in said and "python -P" in said
    Installed.locate_file = lambda *_: tmp_path
    assert _ffi.how_to_have_them(tmp_path) == f"this is the source tree {tmp_path}: pip install -e . compiles them"
