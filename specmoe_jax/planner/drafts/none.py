"""No draft: the target alone."""

from specmoe_jax.planner.drafts.protocol import DraftDescription
from specmoe_jax.planner.drafts.search_starts import SearchStart


class NoDraftDescription(DraftDescription):
    name = "none"
    fields = frozenset()
    several_devices = True
    is_measured = True  # nothing to add

    def start(self, config, flow: SearchStart, *, trees: bool = False) -> SearchStart:
        return flow


DRAFT = NoDraftDescription()
