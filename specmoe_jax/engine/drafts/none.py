"""No draft: every step is plain decoding."""

from specmoe_jax.engine.drafts.protocol import DraftExecutor


class NoDraftExecutor(DraftExecutor):
    """Proposes nothing, needs nothing."""


DRAFT = NoDraftExecutor()
