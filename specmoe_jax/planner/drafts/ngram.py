"""Prompt lookup, whose only cost is its look-ups on the host."""

from specmoe_jax.planner.drafts.protocol import DraftDescription


class NgramDraftDescription(DraftDescription):
    name = "ngram"
    several_devices = True
    assumed_acceptance = 0.2
    is_measured = True

    def timed(self, num_experts: int) -> tuple[dict, ...]:
        return ({"draft_length": 3},)

    def operator(self, *, trees: bool) -> str:
        return "lookup"

    def measured_seconds(self, plan, config, operators, case) -> float:
        return operators.seconds("lookup", rows=case.rows, read=case.rows * case.context)


DRAFT = NgramDraftDescription()
