"""A custom draft object, given to Engine."""

from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import PlanError


class CustomExecutor(DraftExecutor):
    def check(self, model: Model, inputs: DraftInputs) -> None:
        if not callable(getattr(inputs.draft, "propose", None)):
            raise PlanError(
                f"the draft object is a {type(inputs.draft).__name__} without propose(view); docs/extending.md has an example"
            )


DRAFT = CustomExecutor()
