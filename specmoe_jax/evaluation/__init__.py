"""Evaluation of a model through an engine: perplexity of texts, and an adapter for lm-evaluation-harness."""

from specmoe_jax.evaluation.harness import harness_model, run_tasks
from specmoe_jax.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "harness_model", "perplexity", "run_tasks"]
