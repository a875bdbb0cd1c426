"""Experts as one row of bytes each, unpacked where they are multiplied: a packing kind is one module of this folder.

They stay so in host memory, on the link and in the slots, and are unpacked tile by tile inside the feed-forward network: a slot
then takes a fraction of the accelerator's memory, which holds more experts, at the price of unpacking them each time they are used.
"""

from specmoe_jax.models.packing.blocks import pack, packed_bytes, sections, unpack, unpacked, without_packing
from specmoe_jax.models.packing.kind import Kernel, PackingKind, Section
from specmoe_jax.models.packing.registry import is_published, kind_of, planned

__all__ = [
    "Kernel",
    "PackingKind",
    "Section",
    "is_published",
    "kind_of",
    "pack",
    "packed_bytes",
    "planned",
    "sections",
    "unpack",
    "unpacked",
    "without_packing",
]
