"""Kernels that read an accelerator's memory as XLA would not: experts where they lie in the slot pool, without a copy."""
