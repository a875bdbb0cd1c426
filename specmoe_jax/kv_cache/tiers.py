"""Where a KV cache lies, as far as memory and costs depend on it. Pure; engine/flows/kv_tiers.py attends there."""

from typing import NamedTuple


class KvTierDescription(NamedTuple):
    """on_host: the cache is in host memory and the CPU attends over it; queries, keys and values cross the link instead."""

    name: str
    on_host: bool


ON_ACCELERATOR = KvTierDescription("accelerator", on_host=False)
ON_HOST = KvTierDescription("host", on_host=True)
