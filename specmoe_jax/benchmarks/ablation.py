"""Every idea beyond both papers alone and together, against the best cache, at equal accelerator memory.

The pool of each row has the same slots: those of a layer's dispatch, and N for each layer, which hold pinned draft experts, a
cache of all layers' experts, prefetched ones or merged ones, as the row says (on_demand, which keeps nothing, does without). Link,
acceptance and the longest draft are the same for all rows.
"""

from specmoe_jax.benchmarks.rounds import Case, compare
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.config.plan import Plan

CACHES = ("usage", "lru", "lfru", "expected")


def ablation(s: Setting) -> dict:
    """Each idea alone and the best together at equal accelerator memory; x cache: speed over the best cache."""
    rows = {}
    for batch in s.batches:
        results = compare(s.model, cases(s, batch), s.job(batch))
        best = max(row["decode_tokens_per_s"] for name, row in results.items() if name.startswith("cache"))
        for name, row in results.items():
            row["speed_over_cache"] = row["decode_tokens_per_s"] / best
            rows[f"{name} @ {batch}"] = row | {"case": name, "batch": batch}
    return rows


def cases(s: Setting, batch: int) -> list[Case]:
    """The rows of one batch."""
    layers = s.model.config.num_moe_layers
    fewer, spare = s.experts // 2, (s.experts - s.experts // 2) * layers
    kept = {"retain": True, "spare_slots": s.experts * layers}
    some = {"draft_experts": fewer, "spare_slots": spare}
    demand = {"retain": True, "retain_policy": "drafted"}
    cached = [(f"cache, {policy}", s.plan("on_demand", batch, retain_policy=policy, **kept)) for policy in CACHES]
    plans: list[tuple[str, Plan]] = [
        ("on_demand", s.plan("on_demand", batch)),
        *cached,
        ("caching + retain", s.plan("caching", batch, cached_experts=s.experts, retain=True)),
        ("specmoe as published", s.specmoe(batch)),
        ("+ prefetch", s.specmoe(batch, prefetch="draft", **some)),
        ("+ retain", s.specmoe(batch, retain=True)),
        ("+ retain, guard", s.specmoe(batch, retain=True, guard=True)),
        ("+ prefetch, retain, guard", s.specmoe(batch, prefetch="draft", retain=True, guard=True, **some)),
        ("+ fewer pinned, retain", s.specmoe(batch, retain=True, **some)),
        ("+ union stop", s.specmoe(batch, draft_stop="union")),
        ("+ retain, union stop", s.specmoe(batch, retain=True, draft_stop="union")),
        ("+ retain by demand", s.specmoe(batch, **demand)),
        *((f"+ top {k} of a token", s.specmoe(batch, draft_top_k=k)) for k in top_ks(s)),
        ("merged once", s.specmoe(batch, draft="merged")),
        *((f"merged each {n}", s.specmoe(batch, draft="merged", merge_every=n)) for n in s.ends((1, 4, 16))),
        ("retain by demand, union stop", s.specmoe(batch, draft_stop="union", **demand)),
        ("retain by demand, guard", s.specmoe(batch, guard=True, **demand)),
        *((f"all, top {k}", s.specmoe(batch, draft_stop="union", draft_top_k=k, **demand)) for k in top_ks(s)),
        ("all, fewer pinned, prefetch", s.specmoe(batch, draft_stop="union", prefetch="draft", **demand, **some)),
    ]
    return [Case(name, plan, None if name == "on_demand" else "on_demand") for name, plan in plans]


def top_ks(s: Setting) -> tuple[int, ...]:
    """Fewer choices than a token has."""
    chosen = s.model.config.experts_per_token
    return s.ends(tuple(sorted({max(chosen // 2, 1), max(chosen - 1, 1)} - {chosen})))
