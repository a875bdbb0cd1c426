"""The executing half of a draft: what the engine asks of it. One object for each name of config.registry.DRAFTS.

The draft itself, which proposes tokens in every step, is speculate.drafts.protocol.Draft.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.planner.memory.memory_account import DraftMemory, MemoryAccount
from specmoe_jax.speculate.drafts.protocol import Draft
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots


class DraftInputs(NamedTuple):
    """The inputs of an engine for its draft; the names are the arguments of Engine."""

    draft: Draft | None = None
    draft_model: Model | None = None
    draft_head: EagleHead | None = None
    mtp_head: MtpHead | None = None


class DraftExecutor(Protocol):
    """A subclass overrides what differs from a draft that needs neither weights nor experts. runtime: an engine.runtime.Runtime."""

    def check(self, model: Model, inputs: DraftInputs) -> None:
        """Raises PlanError for an input that does not match the model; its presence has been checked."""

    def memory(self, model: Model, plan: Plan, inputs: DraftInputs) -> DraftMemory:
        """The planner's account of what was given."""
        return plan.drafting.memory(plan, model.config)

    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> Draft | None:
        """The draft, once for an engine; None where nothing is proposed."""
        return inputs.draft

    def for_job(self, draft: Draft | None, runtime: Any, account: MemoryAccount) -> Draft | None:
        """The draft for a job with this account. runtime: what all jobs of the engine share."""
        return draft

    def neighbours(self, model: Model, plan: Plan, progress: str | bool) -> np.ndarray | None:
        """[L, E, E]: for each expert its possible substitutes, the nearest first; None without substitution."""
        return None

    def slots(self, runtime: Any, memory: ExpertMemory) -> list[DraftSlots] | None:
        """Of each layer with experts, the slots that a draft step computes with; None where the draft does not run the target."""
        return None

    def after_prefill(self, runtime: Any, memory: ExpertMemory, counts: np.ndarray) -> ExpertMemory:
        """The memory before the first step. counts: [L, E], how often the prompts' tokens chose each expert."""
        return memory

    def after_step(self, runtime: Any, memory: ExpertMemory, counts: np.ndarray) -> ExpertMemory:
        """The memory after a step. counts: [L, E], how often its verification chose each expert."""
        return memory

    def random_inputs(self, model: Model) -> dict:
        """Arguments of Engine, by name, with random weights, to time the draft."""
        return {}

    def calibration_runs(self, inputs: DraftInputs, length: int) -> dict[str, dict]:
        """Fields over the resident preset of the runs that tell what is accepted, by their names in a calibration."""
        return {}

    def rate_on_text(self, prompt: tuple[int, ...], generated: tuple[int, ...]) -> float | None:
        """The share of a generated text that the draft would have proposed token by token; None if it takes a run to know."""
        return None
