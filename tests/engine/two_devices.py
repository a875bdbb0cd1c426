"""A rehearsal of a machine with an accelerator: of two CPU devices one is the accelerator, the other the host's CPU.

Run by test_two_devices.py in a process of its own. What mixes arrays of both in one program fails here as it does on a GPU, and
so does a copy between them that nobody asked for: implicit ones are disallowed. The last line is JSON: tokens by plan.
"""

import json
from unittest import mock

import jax
from engine_cases import SAMPLED, plan, run

from specmoe_jax.engine import runtime
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.models.eagle.network import position_bytes
from specmoe_jax.testing import eagle_head, tiny

PAGE = KV_PAGE * position_bytes(eagle_head(tiny()))
PLANS = {
    "streaming": plan("streaming", batch_size=4, micro_batches=2, pinned_layers=1),
    "specmoeoff": plan("specmoeoff", batch_size=4, draft_length=3, prefill_chunk=8, prefill_attention="accelerator"),
    "tree": plan("specmoeoff", batch_size=4, draft_length=3, draft_tree_top_k=2, draft_tree_tokens=4),
    "split": plan("specmoeoff", batch_size=4, draft_length=3, draft_kv_bytes=2 * PAGE),  # half of the rows draft on the host
    "split tree": plan(
        "specmoeoff", batch_size=4, draft_length=3, draft_tree_top_k=2, draft_tree_tokens=4, draft_kv_bytes=3 * PAGE
    ),
    "specmoe": plan("specmoe", batch_size=8, kv_tier="host", prefetch="draft"),
    "spare": plan("specmoe", batch_size=8, prefetch="draft", retain=True, spare_slots=2, substitution="distinct"),
    "caching": plan("caching", batch_size=8, retain=True),
    "merged": plan("specmoe", batch_size=8, draft="merged", draft_experts=2),
    "shared": plan("caching", batch_size=8, retain=True, host_share=0.5),
    "shared draft": plan("specmoe", batch_size=8, prefetch="draft", host_share=1.0),
}


def main() -> None:
    accelerator, host = jax.devices()
    assert accelerator == jax.numpy.zeros(1).device
    tokens = {}
    jax.config.update("jax_transfer_guard_device_to_device", "disallow")  # of all threads, which the context manager is not
    two_at_a_time = mock.patch.object(runtime, "arriving_experts", lambda expert_bytes, num_experts: 2)
    with mock.patch.object(jax, "local_devices", lambda backend=None: [host] if backend else jax.devices()), two_at_a_time:
        for name, a_plan in PLANS.items():
            head = {"draft_head": eagle_head(tiny())} if a_plan.draft == "eagle" else {}
            tokens[name], stats = run(tiny(), a_plan, **head)
            assert a_plan.kv_tier == "accelerator" or stats["activation_link_bytes"] > 0
            assert (stats["draft_cpu_row_share"] > 0) == name.startswith("split")
            assert stats["compilations_after_warmup"] == 0, name
            assert stats["prefetch_bytes"] > 0 or name != "specmoe"
        tokens["sampled"] = run(tiny(), PLANS["streaming"], params=SAMPLED)[0]
    print(json.dumps(tokens))


if __name__ == "__main__":
    main()
