"""No draft: the target alone."""

from specmoe_jax.planner.drafts.protocol import DraftDescription
from specmoe_jax.planner.drafts.search_starts import SearchStart


class NoDraft(DraftDescription):
    name = "none"
    fields = frozenset()

    def start(self, config, flow: SearchStart, *, trees: bool = False) -> SearchStart:
        return flow


DRAFT = NoDraft()
