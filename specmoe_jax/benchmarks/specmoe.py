"""The SpecMoE suite: tables in the shape of the paper's figures 11 to 16 and tables II and III, and what lies beyond it."""

from specmoe_jax.benchmarks.ablation import ablation
from specmoe_jax.benchmarks.categories import categories
from specmoe_jax.benchmarks.kinds import kinds
from specmoe_jax.benchmarks.rounds import Case, compare
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.config.registry import DRAFT_SETS


def batches(s: Setting) -> dict:
    """Figures 11 to 13: every system over batch sizes; growth of bytes."""
    rows = {}
    for batch in s.batches:
        cases = [
            Case("on_demand", s.plan("on_demand", batch)),
            Case("overlap", s.plan("overlap", batch), "on_demand"),
            Case("caching", s.plan("caching", batch), "on_demand"),
            Case("specmoe", s.specmoe(batch), "on_demand"),
            Case("specmoe + prefetch", s.specmoe(batch, prefetch="draft"), "on_demand"),
            Case("specmoe, all of ours", s.specmoe(batch, prefetch="draft", retain=True, guard=True), "on_demand"),
        ]
        rows |= _rows(s, cases, batch, also="caching")
    return rows


def retain(s: Setting) -> dict:
    """Retained experts for every system, without and with speculation."""
    rows = {}
    for batch in s.ends(s.batches):
        cases = [
            Case("on_demand", s.plan("on_demand", batch)),
            Case("caching", s.plan("caching", batch), "on_demand"),
            Case("on_demand + retain", s.plan("on_demand", batch, retain=True), "on_demand"),
            Case("caching + retain", s.plan("caching", batch, retain=True), "on_demand"),
            Case("specmoe + retain", s.specmoe(batch, retain=True), "on_demand"),
            Case("specmoe + retain + prefetch", s.specmoe(batch, retain=True, prefetch="draft"), "on_demand"),
            Case("the same, guard", s.specmoe(batch, retain=True, prefetch="draft", guard=True), "on_demand"),
        ]
        rows |= _rows(s, cases, batch, also="caching")
    return rows


def draft_experts(s: Setting) -> dict:
    """Table III: N draft experts per layer, at the largest batch."""
    counts = tuple(n for n in (2, 4, 6, 8, 12, 16) if n < s.model.config.num_experts)
    cases = [Case("on_demand", s.plan("on_demand", s.largest))]
    for n in s.ends(counts):
        cases += [
            Case(f"N = {n}", s.specmoe(s.largest, draft_experts=n, prefetch="draft"), "on_demand"),
            Case(f"caching {n}", s.plan("caching", s.largest, cached_experts=n), "on_demand"),
        ]
    return _rows(s, cases, s.largest)


def draft_lengths(s: Setting) -> dict:
    """Figure 14: the draft's length, at the largest batch."""
    cases = [Case("on_demand", s.plan("on_demand", s.largest))]
    for n in s.ends((1, 2, 4, 7, 10, 14)):
        cases.append(Case(f"length {n}", s.specmoe(s.largest, draft_length=n, prefetch="draft"), "on_demand"))
    return _rows(s, cases, s.largest)


def policies(s: Setting) -> dict:
    """Table II: who is in the draft set; ratios to random."""
    cases = [
        Case(name, s.specmoe(s.largest, draft_set=name), None if name == "random" else "random")
        for name in ("random", *(name for name in DRAFT_SETS if name != "random"))
    ]
    return _rows(s, cases, s.largest)


def substitution(s: Setting) -> dict:
    """Figure 16: who stands in for an expert that is not resident; ratios to random."""
    cases = [
        Case("random", s.specmoe(s.largest, substitution="random")),
        Case("affinity", s.specmoe(s.largest, substitution="affinity"), "random"),
    ]
    return _rows(s, cases, s.largest)


def drafts(s: Setting) -> dict:
    """Every training-free draft over N, length and batch, with the prefetcher where the draft has gates."""
    rows = {}
    for batch in s.batches:
        cases = [Case("on_demand", s.plan("on_demand", batch))]
        for length in s.ends((2, 4, 8)):
            cases.append(Case(f"ngram, length {length}", s.ngram(batch, length), "on_demand"))
            for n in s.ends(tuple(n for n in (2, 4, 6, 8) if n < s.model.config.num_experts)):
                for draft in ("self", "merged"):
                    plan = s.specmoe(batch, draft=draft, draft_experts=n, draft_length=length, prefetch="draft")
                    cases.append(Case(f"{draft}, {n} experts, length {length}", plan, "on_demand"))
        rows |= _rows(s, cases, batch)
    return rows


def guard(s: Setting) -> dict:
    """Never slower: nothing accepted, and the real (or given) acceptance; each against the same plan without a draft.

    The base keeps N experts of every layer too, by hot_global; the guarded plans by their own rule and by that. That of the
    n-gram draft, which needs no experts, and of merged ones, which are nobody's own, is on_demand.
    """
    rows = {}
    for batch in s.ends(s.batches):
        cases = [
            Case("no draft", s.plan("caching", batch, cached_experts=s.experts)),
            Case("on_demand", s.plan("on_demand", batch), "no draft"),
        ]
        for policy in ("hot_temporal", "hot_global"):
            cases += [
                Case(
                    f"guard, 0 accepted, {policy}",
                    s.specmoe(batch, synthetic_acceptance=0.0, guard=True, draft_set=policy),
                    "no draft",
                ),
                Case(f"guard, {policy}", s.specmoe(batch, guard=True, draft_set=policy), "no draft"),
            ]
        cases += [
            Case("guard, merged", s.specmoe(batch, draft="merged", guard=True), "on_demand"),
            Case("guard, ngram", s.ngram(batch, s.length, guard=True), "on_demand"),
            Case("no guard, ngram", s.ngram(batch, s.length), "on_demand"),
            Case("no guard, 0 accepted", s.specmoe(batch, synthetic_acceptance=0.0), "no draft"),
        ]
        rows |= _rows(s, cases, batch)
    return rows


TABLES = {
    "batches": batches,
    "retain": retain,
    "draft_experts": draft_experts,
    "draft_lengths": draft_lengths,
    "policies": policies,
    "substitution": substitution,
    "drafts": drafts,
    "guard": guard,
    "categories": categories,
    "ablation": ablation,
    "kinds": kinds,
}
ON_REQUEST = ("categories", "ablation", "kinds")  # tables that run when they are named


def _rows(s: Setting, cases: list[Case], batch: int, also: str | None = None) -> dict:
    """{"name @ batch": figures}; also: a further base, whose ratios every row gets."""
    results = compare(s.model, cases, s.job(batch))
    if also is not None:
        base = results[also]
        for row in results.values():
            row[f"speed_over_{also}"] = row["decode_tokens_per_s"] / base["decode_tokens_per_s"]
            row[f"bytes_over_{also}"] = row["link_bytes_per_token"] / base["link_bytes_per_token"]
    return {f"{name} @ {batch}": figures | {"case": name, "batch": batch} for name, figures in results.items()}


def with_growth(rows: dict) -> dict:
    """bytes_growth: expert bytes for one token of every row, over the same system's at the smallest batch."""
    smallest = min(row["batch"] for row in rows.values())
    for row in rows.values():
        first = rows.get(f"{row['case']} @ {smallest}")
        sent = first and first["link_bytes_per_token"] * smallest
        row["bytes_growth"] = row["link_bytes_per_token"] * row["batch"] / sent if sent else None
    return rows
