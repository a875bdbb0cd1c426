"""What the tables of the SpecMoE suite share."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from specmoe_jax.benchmarks.rounds import Job
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead


class Setting(NamedTuple):
    """What all tables of a run share.

    link_bytes_per_s: of the emulated link. acceptance: synthetic, None for the real one. experts, length: N and draft
    length where they are not swept. job: (batch) -> Job. quick: only the ends of every sweep. categories: prompts by kind of
    text. heads: of the drafts that have weights of their own, by the draft's name.
    """

    model: Model
    link_bytes_per_s: float
    acceptance: float | None
    experts: int
    length: int
    batches: tuple[int, ...]
    job: Callable[[int], Job]
    quick: bool
    categories: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    heads: Mapping[str, EagleHead | MtpHead] = MappingProxyType({})

    def plan(self, name: str, batch: int, **changes) -> Plan:
        return preset(name, self.model.config).replace(batch_size=batch, link_bytes_per_s=self.link_bytes_per_s, **changes)

    def specmoe(self, batch: int, **changes) -> Plan:
        defaults = {
            "draft_experts": self.experts,
            "draft_length": self.length,
            "synthetic_acceptance": self.acceptance,
        }
        return self.plan("specmoe", batch, **(defaults | changes))

    def ngram(self, batch: int, length: int, **changes) -> Plan:
        return self.plan("on_demand", batch, draft="ngram", draft_length=length, synthetic_acceptance=self.acceptance, **changes)

    def ends(self, values: tuple) -> tuple:
        return values[:: len(values) - 1] if self.quick and len(values) > 2 else values

    @property
    def largest(self) -> int:
        return max(self.batches)
