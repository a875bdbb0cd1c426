"""dense_product: the kernel for few rows and XLA's product against float64; a row depends on itself alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.models.packing.kinds.int4 import encode_rows
from specmoe_jax.ops.cpu import dense
from specmoe_jax.ops.xla import dense as xla

F32, BF16 = jnp.float32, jnp.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "mixed": (F32, BF16)}
SHAPES = {"one": (1, 1, 1), "odd": (5, 77, 203), "wide": (3, 9, 4100), "rows": (32, 130, 96), "many_rows": (70, 33, 64)}


def one(form):
    """The product of one matrix, by what takes some."""
    return lambda *args: form(*args)[0]


product, packed_product = one(dense.products), one(dense.packed_products)


def make(seed, n, N, M, x_dtype, w_dtype):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, M)), x_dtype), jnp.asarray(rng.normal(size=(N, M)), w_dtype)


@pytest.fixture(params=["kernel", "xla", "reference"])
def form(request):
    if request.param == "kernel" and not ops.isas():
        pytest.skip("the compiled kernels are not usable here")
    return {"kernel": product, "xla": xla.product, "reference": ops.dense_product_ref}[request.param]


def assert_accurate(form, x, weight):
    """Summing M products in float32, in any order: M roundings of sums that are at most the sum of magnitudes."""
    a, b = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    error = np.abs(np.asarray(jax.jit(lambda *args: form(*args))(x, weight)) - a @ b.T)
    assert np.all(error <= (4 + np.sqrt(x.shape[1])) * 2.0**-24 * (np.abs(a) @ np.abs(b).T))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_agrees_with_float64(form, shape, dtypes):
    assert_accurate(form, *make(1, *SHAPES[shape], *DTYPES[dtypes]))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_instruction_set_agrees_with_float64(isa, dtypes):
    for shape in SHAPES.values():
        assert_accurate(product, *make(2, *shape, *DTYPES[dtypes]))


PACKED = {
    "kernel": packed_product,
    "xla": xla.packed_product,
    "reference": lambda x, *m: ops.packed_product_ref(x, ops.PackedMatrix(*m)),
}


def packed(seed, n, N, M, x_dtype):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-127, 128, size=(N, M)), jnp.int8)
    return jnp.asarray(rng.normal(size=(n, M)), x_dtype), codes, jnp.asarray(rng.random(N) / 127, F32)


def assert_packed(form, x, codes, scales):
    """As assert_accurate; scales are one rounding more."""
    a, b = np.asarray(x, np.float64), np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[:, None]
    error = np.abs(np.asarray(jax.jit(lambda *args: form(*args))(x, codes, scales)) - a @ b.T)
    assert np.all(error <= (5 + np.sqrt(x.shape[1])) * 2.0**-24 * (np.abs(a) @ np.abs(b).T))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_packed_matrices_are_decoded_exactly(kernels, name, dtype):
    for shape in SHAPES.values():
        assert_packed(PACKED[name], *packed(4, *shape, dtype))


def test_packed_matrices_on_every_instruction_set(isa):
    x, codes, scales = packed(5, 32, 4001, 72, BF16)
    assert_packed(packed_product, x, codes, scales)
    whole = np.asarray(packed_product(x, codes, scales))
    for n in (1, 2, 5, 9, 13):  # a row depends on itself alone
        np.testing.assert_array_equal(packed_product(x[3 : 3 + n], codes, scales), whole[3 : 3 + n])


def in_groups(seed, n, N, M, x_dtype):
    """x, a matrix in int4, and what it stands for."""
    rng = np.random.default_rng(seed)
    codes, scales = encode_rows(rng.normal(size=(N, M)).astype(np.float32))
    exact = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.float64) - 8
    exact = (exact * scales[..., None].astype(np.float64)).reshape(N, -1)[:, :M]
    return jnp.asarray(rng.normal(size=(n, M)), x_dtype), ops.PackedMatrix(jnp.asarray(codes), jnp.asarray(scales)), exact


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_matrices_in_groups_are_decoded_exactly(kernels, name, dtype):
    """The kernel alone rounds x, to integers of 16 bits: by half a step of its 32 columns at most."""
    for n, N, M in SHAPES.values():
        x, matrix, exact = in_groups(6, n, N, M, dtype)
        a, got = np.abs(np.asarray(x, np.float64)), jax.jit(lambda *args: PACKED[name](*args))(x, *matrix)
        error = np.abs(np.asarray(got, np.float64) - np.asarray(x, np.float64) @ exact.T)
        largest = np.pad(a, ((0, 0), (0, -M % 32))).reshape(n, -1, 32).max(-1).repeat(32, axis=1)[:, :M]
        rounded = 2.0**-16 * largest * (name == "kernel") + (5 + np.sqrt(M)) * 2.0**-24 * a
        assert np.all(error <= rounded @ np.abs(exact).T)


def test_matrices_in_groups_on_every_instruction_set(isa):
    x, matrix, exact = in_groups(7, 32, 4001, 72, F32)
    whole = np.asarray(packed_product(x, *matrix))
    np.testing.assert_allclose(whole, np.asarray(x, np.float64) @ exact.T, atol=1e-3)
    for n in (1, 2, 5, 9, 13):  # a row depends on itself alone
        np.testing.assert_array_equal(packed_product(x[3 : 3 + n], *matrix), whole[3 : 3 + n])
    out = np.asarray(packed_product(x[:3].at[1, 3].set(np.nan), *matrix))
    assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        ((4, 3), (5,), r"scales has shape \(5,\), wanted \[4\]"),
        ((4, 2), (4,), r"codes has shape \(4, 2\), wanted \[any, 3\]"),
    ],
)
def test_packed_matrices_that_do_not_fit(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        ops.dense_product(jnp.ones((1, 3)), ops.PackedMatrix(jnp.ones(codes, jnp.int8), jnp.ones(scales)))
    with pytest.raises(ValueError, match=r"codes has shape \(4, 16\), wanted \[any, 32\]"):
        ops.dense_product(jnp.ones((1, 40)), ops.PackedMatrix(jnp.ones((4, 16), jnp.uint8), jnp.ones((4, 1), BF16)))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_row_depends_on_itself_alone(isa, monkeypatch, dtypes):
    x, weight = make(3, 32, 4001, 72, *DTYPES[dtypes])
    whole = np.asarray(product(x, weight))
    for n in (1, 2, 5, 13):
        for i in (0, 17):
            np.testing.assert_array_equal(product(x[i : i + n], weight), whole[i : i + n])
    monkeypatch.setenv("SPECMOE_THREADS", "1")
    np.testing.assert_array_equal(jax.jit(lambda *a: product(*a))(x, weight), whole)


@pytest.mark.parametrize("form", ["f32", "bf16", "mixed", "int8", "int4"])
def test_several_matrices_are_multiplied_as_each_alone(isa, form):
    x = make(8, 3, 1, 203, *DTYPES.get(form, (F32, F32)))[0]

    def matrix(N):
        if form in DTYPES:
            return make(N, 1, N, 203, *DTYPES[form])[1]
        return in_groups(N, 1, N, 203, F32)[1] if form == "int4" else ops.PackedMatrix(*packed(N, 1, N, 203, F32)[1:])

    matrices = [matrix(N) for N in (400, 1, 77)]
    together = jax.jit(lambda *args: ops.dense_products(*args))
    assert together.lower(x, matrices).as_text().count("few_rows_products") == 1
    for got, alone in zip(together(x, matrices), matrices, strict=True):
        np.testing.assert_array_equal(got, product(x, alone) if form in DTYPES else packed_product(x, *alone))
    other = make(9, 1, 5, 203, F32, F32)[1] if form != "f32" else matrix(5).astype(BF16)
    assert [y.shape for y in ops.dense_products(x, [*matrices, other])] == [(3, 400), (3, 1), (3, 77), (3, 5)]


def test_few_rows_of_a_large_matrix_take_the_kernel(kernels):
    def takes_it(n, N, M):
        text = jax.jit(lambda *a: ops.dense_product(*a)).lower(jnp.ones((n, 1, M)), jnp.ones((N, M))).as_text()
        return "specmoe_few_rows_products" in text

    wide = dense.CACHED // dense.FEW_ROWS * 2  # columns
    enough = dense.LEAST_BYTES // 4 // wide  # rows of the matrix
    assert takes_it(1, 512, 512) and takes_it(dense.CACHED // 512, 512, 512) and takes_it(dense.FEW_ROWS, enough, wide)
    assert not takes_it(dense.CACHED // 512 + 1, 512, 512) and not takes_it(dense.FEW_ROWS + 1, enough, wide)
    assert not takes_it(1, dense.LEAST_BYTES // 4 // 512 - 1, 512) and not takes_it(0, 512, 512)


def test_what_is_not_finite_stays_in_its_row(isa):
    x, weight = make(4, 3, 40, 50, F32, F32)
    out = np.asarray(product(x.at[1, 3].set(np.nan), weight))
    assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()


def test_the_kernel_has_the_derivatives_of_the_product(kernels):
    x, weight = make(5, 4, 30, 20, F32, F32)
    got, want = (jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), argnums=(0, 1))(x, weight) for f in (product, xla.product))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3\), wanted \[any, 5\]"):
        ops.dense_product(jnp.ones((2, 5)), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match="weight has dtype int32, wanted float32 or bfloat16"):
        ops.dense_product(jnp.ones((2, 5)), jnp.ones((4, 5), jnp.int32))
