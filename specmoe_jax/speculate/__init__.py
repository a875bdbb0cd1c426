"""Drafts behind one protocol, affinity and hotness of experts, and lossless acceptance."""

from specmoe_jax.speculate.acceptance import accept
from specmoe_jax.speculate.drafts.protocol import Draft, DraftView
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy

__all__ = ["Draft", "DraftSetPolicy", "DraftView", "SelfDraft", "accept"]
