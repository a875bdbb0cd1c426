"""Counters of an engine since it was made, and the figures derived from them."""

import resource
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.roofline import predicted_figures, roofline_figures
from specmoe_jax.engine.state import StepInfo
from specmoe_jax.engine.step import Moved
from specmoe_jax.models.experts import layer_bytes
from specmoe_jax.models.model import Model
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.support.timing import CompileCounter, Stopwatch


class PromptWatch(NamedTuple):
    """Started before prompts go through the model. compile_s: of compilations before."""

    watch: Stopwatch
    compile_s: float


class EngineFigures:
    """recompiled: compilations inside timed steps, which should be none. running: of the current batch, None between batches.

    draft_set: the name of its policy; None for the plan's default.
    """

    def __init__(self, model: Model, plan: Plan, *, draft_set: str | None):
        self._model, self._plan, self._draft_set = model, plan, draft_set
        self.compiles = CompileCounter()
        self.recompiled, self.warm_up_s = 0, 0.0
        self.totals, self.prefill_s = metrics.Totals(), 0.0
        self.prefill_tokens, self._computing_s = 0, 0.0
        self._on_demand_experts, self.running = 0, None
        self.prefill_link_bytes = self.prefill_disk_bytes = 0
        self.scored_tokens = self.score_read_tokens = self.score_link_bytes = self.score_disk_bytes = 0
        self.score_s = 0.0

    def add_step(self, info: StepInfo) -> None:
        """A step that counts as decoding."""
        self.totals = metrics.add_step(self.totals, info)

    def add_compilations(self, since: int) -> None:
        """Compilations during a step, which should be none. since: `compiles.count` before it."""
        self.recompiled += self.compiles.count - since

    def add_prefill(self, seconds: float, *, tokens: int, computing: PromptWatch) -> None:
        """Prompts of so many tokens have gone through the model while `computing` ran, a part of these seconds."""
        self.prefill_s += seconds
        self.prefill_tokens += tokens
        self._computing_s += computing.watch.seconds - (self.compiles.seconds - computing.compile_s)

    def prompt_watch(self) -> PromptWatch:
        return PromptWatch(Stopwatch(), self.compiles.seconds)

    def add_warm_up(self, seconds: float) -> None:
        self.warm_up_s += seconds

    def set_running(self, on_demand: metrics.OnDemand) -> None:
        """What plain decoding of the current batch would have fetched so far."""
        self.running = on_demand

    def end_batch(self, on_demand: metrics.OnDemand) -> None:
        """Adds what plain decoding of a finished batch would have fetched."""
        self._on_demand_experts, self.running = self._on_demand_experts + on_demand.experts, None

    def add_prefill_bytes(self, before: Moved, after: Moved) -> None:
        """What moved between the two."""
        self.prefill_link_bytes += after.link_bytes - before.link_bytes
        self.prefill_disk_bytes += after.below.since(before.below).disk_bytes

    def add_scores(self, tokens: int, read: int, seconds: float) -> None:
        """tokens: whose log-probability was told. read: that went through the model for it, the contexts included."""
        self.scored_tokens, self.score_read_tokens = self.scored_tokens + tokens, self.score_read_tokens + read
        self.score_s += seconds

    def add_score_bytes(self, before: Moved, after: Moved) -> None:
        """What moved while texts were read."""
        self.score_link_bytes += after.link_bytes - before.link_bytes
        self.score_disk_bytes += after.below.since(before.below).disk_bytes

    def figures(self, hardware: Hardware | None, prediction: Prediction | None, peak_accelerator_bytes: int | None) -> dict:
        """What Engine.stats gives, with its arguments."""
        figures = metrics.figures(
            self.totals,
            self._plan,
            on_demand_bytes=self._on_demand_bytes() if self._plan.flow.tells_routing else None,
            link_bytes_per_s=self._plan.link_bytes_per_s,
            model_stamps=self._model.synthetic,
        )
        if hardware is not None and self._model.config.encoder is None:
            figures |= roofline_figures(self._model.config, self._plan, self.totals, hardware)
        if prediction is not None:
            figures |= predicted_figures(prediction, self.totals)
        return figures | {
            "prefill_s": self.prefill_s,
            "prefill_tokens": self.prefill_tokens,
            "prefill_tokens_per_s": self.prefill_tokens / self._computing_s if self._computing_s > 0 else None,
            "warm_up_s": self.warm_up_s,
            "prefill_link_bytes": self.prefill_link_bytes,
            "prefill_disk_bytes": self.prefill_disk_bytes,
            "scored_tokens": self.scored_tokens,
            "score_read_tokens": self.score_read_tokens,
            "score_s": self.score_s,
            "score_link_bytes": self.score_link_bytes,
            "score_disk_bytes": self.score_disk_bytes,
            "compile_s": self.compiles.seconds,
            "compilations_after_warmup": self.recompiled,
            "peak_accelerator_bytes": peak_accelerator_bytes,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "draft_set": self._draft_set,
            "plan": self._plan.to_dict(),
        }

    def _on_demand_bytes(self) -> int:
        running = self.running.experts if self.running else 0
        counts, sizes = self._on_demand_experts + running, layer_bytes(self._model.config, self._model.dtype)
        return int(np.sum(counts * np.array(sizes[: self._model.config.num_moe_layers])))  # not those of an encoder, behind them
