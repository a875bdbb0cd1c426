"""The draft head that a plan of the bundled model needs."""

from specmoe_jax.checkpoints.eagle import bundled_head, load_head
from specmoe_jax.config.plan import Plan


def head_of(model, plan: Plan):
    return load_head(bundled_head("demo"), model) if plan.drafting.given == "draft_head" else None
