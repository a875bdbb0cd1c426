"""Where a KV cache lies, as far as memory and costs depend on it. Pure; engine/flows/kv_tiers.py attends there."""

from typing import NamedTuple


class KvTier(NamedTuple):
    """on_host: the cache is in host memory and the CPU attends over it; queries, keys and values cross the link instead."""

    name: str
    on_host: bool


ACCELERATOR = KvTier("accelerator", on_host=False)
HOST = KvTier("host", on_host=True)
