"""The one place that chooses between implementations of a kernel.

To add a variant: write its function in one file of `cpu/`, `pallas/` or `xla/`, and add one line to KERNELS below, before those
that it shall precede.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from specmoe_jax.ops.cpu import attention as cpu_attention
from specmoe_jax.ops.cpu import dense as cpu_dense
from specmoe_jax.ops.cpu import experts as cpu_experts
from specmoe_jax.ops.cpu import rows as cpu_rows
from specmoe_jax.ops.pallas import grouped_experts
from specmoe_jax.ops.xla import attention as xla_attention
from specmoe_jax.ops.xla import dense, prefill_attention
from specmoe_jax.ops.xla import experts as xla_experts
from specmoe_jax.ops.xla import rows as xla_rows


def always(*arrays, **options) -> bool:
    return True


class Variant(NamedTuple):
    """One implementation of a kernel.

    run: (*arrays, **options), as its op hands them over; an array that the caller left out is None.
    platform: the only platform that the variant can be lowered for; None: any.
    fits: whether it computes this case. It sees shapes, dtypes and options, and may look at the environment, but not at values.
    """

    run: Callable
    platform: str | None = None
    fits: Callable[..., bool] = always


def call(kernel: str, *arrays, **options):
    """The kernel by the first of its variants that fits, for each platform that the program may be lowered for."""
    chosen: dict[str, Callable] = {}
    for variant in KERNELS[kernel].values():
        if variant.fits(*arrays, **options):
            chosen.setdefault(variant.platform or "default", functools.partial(variant.run, **options))
        if "default" in chosen:
            break
    return chosen["default"](*arrays) if len(chosen) == 1 else jax.lax.platform_dependent(*arrays, **chosen)


# kernel -> implementation -> variant, in order of preference; the last one of each takes everything.
KERNELS: dict[str, dict[str, Variant]] = {
    "chunked_attention": {
        "cpu": Variant(cpu_attention.rows, "cpu", cpu_attention.fits),
        "cpu_append": Variant(functools.partial(xla_attention.rows, put=cpu_rows.put), "cpu", cpu_rows.fits),
        "xla": Variant(xla_attention.rows),
    },
    "chunked_attention_packed": {
        "cpu": Variant(cpu_attention.packed, "cpu", cpu_attention.fits),
        "xla": Variant(xla_attention.packed),
    },
    "masked_attention": {"xla": Variant(xla_attention.masked)},
    "prefill_attention": {"xla": Variant(prefill_attention.prefill)},
    "put_rows": {"cpu": Variant(cpu_rows.put, "cpu", cpu_rows.fits), "xla": Variant(xla_rows.put)},
    "put_row": {"cpu": Variant(cpu_rows.put_row, "cpu", cpu_rows.fits_row), "xla": Variant(xla_rows.put_row)},
    "append": {
        "cpu": Variant(functools.partial(xla_rows.append, put=cpu_rows.put), "cpu", cpu_rows.fits),
        "xla": Variant(xla_rows.append),
    },
    "expert_ffn": {
        "cpu": Variant(cpu_experts.plain, "cpu", cpu_experts.fits_plain),
        "cpu_packed": Variant(cpu_experts.packed, "cpu", cpu_experts.fits_packed),
        "tpu": Variant(functools.partial(grouped_experts.run, "tpu"), "tpu", functools.partial(grouped_experts.fits, "tpu")),
        "cuda": Variant(functools.partial(grouped_experts.run, "cuda"), "cuda", functools.partial(grouped_experts.fits, "cuda")),
        "xla": Variant(xla_experts.tiles),
    },
    "dense_product": {
        "cpu": Variant(cpu_dense.products, "cpu", cpu_dense.fits),
        "xla": Variant(dense.products),
    },
    "packed_product": {
        "cpu": Variant(cpu_dense.packed_products, "cpu", cpu_dense.fits_packed),
        "xla": Variant(dense.packed_products),
    },
}
