"""Plans for several devices, on four CPU devices in a process of its own. Run by test_several_devices.py; the last line is JSON.

Arguments: names of PLANS. Of each the tokens by number of devices, and the bytes over each link: as the store counted them, and by
the experts that left host memory; the rows and the bytes of each device's cache after the last step, and as the account has them.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, tokens_of

import specmoe_jax as sm
from specmoe_jax.cli.shown.stats_table import table
from specmoe_jax.engine import cache_rows, context, rows, runtime
from specmoe_jax.engine.runtime import plan_homes
from specmoe_jax.engine.state import HostKV
from specmoe_jax.engine.step import moved
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.offload.residency import Residency
from specmoe_jax.offload.sharded_store import ShardedStore
from specmoe_jax.offload.store import Link
from specmoe_jax.offload.tiers import HostTier
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.testing import eagle_head, tiny, write_tiny
from specmoe_jax.types import MESH_AXIS, RecurrentState

DISK = {"expert_tier": "disk", "host_memory_bytes": 5e5}
SHORT = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
TREE = {"draft_length": 2, "draft_tree_top_k": 2, "draft_tree_tokens": 4}

POPULARITY = np.array([[1, 0, 9, 2, 3], [7, 7, 0, 1, 0], [0, 0, 3, 0, 8]])
"""Of the tiny model's experts, so that no layer's homes are those of the modulo."""

# name -> plan, parameters, numbers of devices
PLANS = {
    "on_demand": (plan("on_demand", batch_size=8), GREEDY, (1, 2, 4)),
    "specmoe": (plan("specmoe", batch_size=8, prefetch="draft"), GREEDY, (4,)),
    "streaming": (plan("streaming", batch_size=4, micro_batches=2, pinned_layers=1), GREEDY, (4,)),
    "one row": (plan("specmoe", batch_size=1, retain=True, prefetch="draft", spare_slots=1), SHORT, (2,)),
    "caching": (plan("caching", batch_size=8, retain=True), SHORT, (4,)),
    "waves": (plan("on_demand", batch_size=8, device_memory_bytes=1e6), SHORT, (2,)),
    "resident": (plan("resident", batch_size=8), SHORT, (4,)),
    "host": (plan("specmoe", batch_size=8, kv_tier="host"), SHORT, (2,)),
    "disk": (plan("on_demand", batch_size=8, **DISK), SHORT, (2,)),
    "sampled": (plan("specmoe", batch_size=8, deterministic_sampling=True), SAMPLED, (4,)),
    "merged": (plan("specmoe", batch_size=8, draft="merged", draft_experts=2, merge_every=2), GREEDY, (4,)),
    "merged, on disk": (plan("on_demand", batch_size=8, draft="merged", draft_experts=3, draft_length=2, **DISK), SHORT, (2,)),
    "placed": (plan("on_demand", batch_size=8, placement="popularity"), GREEDY, (4,)),
    "placed, drafting": (plan("specmoe", batch_size=8, prefetch="draft", retain=True, placement="popularity"), SHORT, (2, 4)),
    "placed, on disk": (plan("specmoe", batch_size=8, placement="popularity", **DISK), SHORT, (2,)),
    "no multiple": (plan("specmoe", batch_size=3, draft_length=2), SHORT, (2,)),
    "a tree": (plan("on_demand", batch_size=4, draft="eagle", **TREE), SHORT, (2, 4)),
    "eagle": (plan("specmoeoff", batch_size=4, draft_length=3, prefill_attention="accelerator"), SHORT, (2,)),
}


class CountingTier(HostTier):
    """Counts how often each expert [L, E] left host memory."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = np.zeros((self.num_layers, self.num_experts // self.num_layers), np.int64)

    def blocks(self, keys):
        np.add.at(self.left, tuple(np.array(keys, np.int64).reshape(-1, 2).T), 1)
        return super().blocks(keys)


def outcome(a_plan, params, folder: str) -> dict:
    """Of a job with a plan."""
    given = {"draft_head": eagle_head(tiny())} if a_plan.draft == "eagle" else {}
    given |= {"popularity": POPULARITY} if a_plan.placing.by_popularity else {}
    engine = sm.Engine(stored(a_plan, folder) if a_plan.expert_tier == "disk" else tiny(), a_plan, **given)
    steps, put_back, caches = [], engine._resources.put_back, []
    engine._resources.put_back = lambda state, shape: (caches.extend(held(state.kv)), put_back(state, shape))
    tokens = tokens_of(engine.generate(PROMPTS, params, on_step=steps.append))
    account = engine._resources.account
    assert account is not None and len({str(cache) for cache in caches}) <= 1
    stats, own = engine.stats(), engine._resources.runtime
    assert stats["compilations_after_warmup"] == 0
    if a_plan.prefetch == "none" and not a_plan.flow.streams_layers:
        keeps_its_share(own, engine._resources._memory.residency)
    size, left = own.experts.expert_bytes, getattr(own.experts.store.tier, "left", None)
    zeros = size * (a_plan.expert_flow != "stream")  # a pool is warmed up by one block
    wanted, blocks = None, merged_blocks(own) * (1 + sum(step.merge_bytes > 0 for step in steps))
    if left is not None:
        wanted = [int(left[own.experts.homes == d].sum() + blocks[d]) * size + zeros for d in range(a_plan.devices)]
    return {
        "tokens": tokens,
        "sent": moved(own).device_bytes.tolist(),
        "wanted": wanted,
        "decoding": stats["device_link_bytes"],
        "link_bytes": stats["link_bytes"],
        "cache": caches[0] if caches else None,
        "accounted": account.accelerator_kv_bytes,
        "said": [line.split("  ")[-1] for line in table(stats | {"load_s": 0.0}).splitlines() if "rows of each device" in line],
        "balance": stats["link_balance"],
    }


def keeps_its_share(own: runtime.Runtime, residency: Residency) -> None:
    """Between passes no device has more of a layer's experts than an equal part of those that stay."""
    for slots, homes, count in zip(residency.slot_of, own.experts.homes, pinned_experts(own.config, own.plan), strict=True):
        kept = np.bincount(homes[slots >= 0], minlength=own.plan.devices)
        assert kept.sum() == count and kept.max() <= most_experts(own.plan.devices, count)


def merged_blocks(own: runtime.Runtime) -> np.ndarray:
    """[devices], on each; a merge brings all anew."""
    slots, of_each = own.experts.merged_slots, own.experts.slots.total // own.plan.devices
    return np.bincount(() if slots is None else slots.reshape(-1) // of_each, minlength=own.plan.devices).astype(int)


def held(kv) -> list[tuple[list[int], list[int]]]:
    """Of each device of this process the rows of every layer's cache, which are the same, and the bytes of all; none of pages."""
    if isinstance(kv, HostKV):
        return []
    shards = [shard for array in (*kv.k, *kv.v) for shard in array.addressable_shards]
    own = {device: [shard.data for shard in shards if shard.device == device] for device in {shard.device for shard in shards}}
    assert all(len({len(one) for one in of_device}) == 1 for of_device in own.values())
    return [([len(one[0]) for one in own.values()], [sum(array.nbytes for array in one) for one in own.values()])]


def stored(a_plan, folder: str):
    """The tiny model from files; loaded into host memory, its experts are pinned for their devices."""
    write_tiny(pathlib.Path(folder))
    homes = plan_homes(tiny().config, a_plan, POPULARITY if a_plan.placing.by_popularity else None)
    loaded = sm.load_model(folder, devices=a_plan.devices, homes=homes if a_plan.placement else None)
    if jax.process_count() == 1:  # of several each holds a part, see processes.py
        assert [[block.device.id for block in layer] for layer in loaded.experts] == homes.tolist()
    return sm.load_model(folder, expert_tier=a_plan.expert_tier)


def lanes() -> list[float]:
    """Blocks for which each of four links is busy when each was given three, the first of them to warm up."""
    devices, block_s, own = jax.local_devices(), 100.0, most_experts(4, 5)
    mesh = jax.sharding.Mesh(np.array(devices), (MESH_AXIS,))
    links = [Link(bytes_per_s=tiny().expert_bytes / block_s) for _ in devices]
    store, slots = ShardedStore(HostTier(tiny().experts, devices), links, mesh), 3 * own
    store.fetch(store.new_pool(4 * slots), [(layer, expert, expert * slots + layer) for layer in range(2) for expert in range(4)])
    return [link.backlog_s / block_s for link in links]


def caches() -> list[list[bool]]:
    """Whether programs over cache rows give the same of a cache on four devices, whole and divided; of buffers and of states."""
    devices = context.place_of(4)
    random = np.random.default_rng(0)
    whole = (
        jax.numpy.asarray(random.normal(size=(8, 2, 24, 4)), jax.numpy.bfloat16),
        RecurrentState(
            state=random.normal(size=(8, 2, 3, 4)).astype(np.float32),
            start=np.arange(8, dtype=np.int32),
            rows=random.normal(size=(8, 6, 5)).astype(np.float32),
        ),
        (),
    )
    divided = rows.place_of_rows(devices, 8)
    path = (np.arange(8, dtype=np.int32), random.integers(1, 4, (8, 2)).astype(np.int32), np.arange(8, dtype=np.int32) % 3)
    some = np.array([6, 1, 1, 3], np.int32)

    def given(cache, place):
        return jax.device_put(jax.tree.map(np.asarray, cache), place)

    def changed(place):
        """place: devices, whole or divided."""
        for cache in whole:
            taken = cache_rows.take_rows(given(cache, place), some)
            yield cache_rows.take_rows(given(cache, place), some[:1])
            yield taken
            yield cache_rows.put_rows(given(cache, place), jax.tree.map(rows.gathered, taken), np.array([2, 7, 8, 0], np.int32))
            yield cache_rows.spread_row(given(cache, place), np.int32(5))
            if not isinstance(cache, tuple) or cache:
                yield cache_rows.keep_path(given(cache, place), *path)

    def alike(a, b) -> bool:
        return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    found = []
    for one, other in zip(changed(devices), changed(divided), strict=True):
        split = [array.addressable_shards[0].data.shape[0] * 4 == len(array) for array in jax.tree.leaves(other) if len(array) > 1]
        found.append([alike(one, other), all(split)])
    return found


def main() -> None:
    runtime.HostTier, found = CountingTier, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or PLANS:
            a_plan, params, counts = PLANS[name]
            found[name] = {count: outcome(a_plan.replace(devices=count), params, folder) for count in counts}
    print(json.dumps({"plans": found, "lanes": lanes(), "caches": caches()}))


if __name__ == "__main__":
    main()
