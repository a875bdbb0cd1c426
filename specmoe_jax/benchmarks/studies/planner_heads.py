"""The draft head that a plan of the bundled model needs."""

from specmoe_jax.checkpoints.eagle import bundled_head, load_head
from specmoe_jax.config.plan import Plan


def demo_head(model):
    name = bundled_head("demo")
    assert name is not None
    return load_head(name, model)


def head_of(model, plan: Plan):
    return demo_head(model) if plan.drafting.given == "draft_head" else None
