"""A draft object of the user's: nothing is known of what it costs, and no profile measures it."""

from specmoe_jax.planner.drafts.checks import TREE_FIELDS
from specmoe_jax.planner.drafts.protocol import DraftDescription


class CustomDraftDescription(DraftDescription):
    name = "custom"
    several_devices = True
    fields = TREE_FIELDS
    given = "draft"


DRAFT = CustomDraftDescription()
