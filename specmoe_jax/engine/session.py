"""What a flow needs of an engine to run its jobs: the resources, the figures, and steps."""

import dataclasses
import logging

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.engine_figures import EngineFigures
from specmoe_jax.engine.requests.prepare import BatchShape
from specmoe_jax.engine.resources import EngineResources
from specmoe_jax.engine.state import State, StepInfo
from specmoe_jax.engine.step import step, warm_up
from specmoe_jax.models.model import Model
from specmoe_jax.support.host_memory import return_freed
from specmoe_jax.support.progress import bar, ticking
from specmoe_jax.support.timing import Stopwatch

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Session:
    """progress: bars of compilation and prefill. warm_shapes: for which steps are compiled, with whether rows are greedy."""

    model: Model
    plan: Plan
    resources: EngineResources
    figures: EngineFigures
    progress: str | bool
    warm_shapes: set[tuple[BatchShape, bool]] = dataclasses.field(default_factory=set)

    def step(self, state: State) -> tuple[State, StepInfo]:
        return step(state.runtime, state, self.model.tokenizer)

    def counted_step(self, state: State) -> tuple[State, StepInfo]:
        """A step during which nothing should compile."""
        compiled = self.figures.compiles.count
        state, info = self.step(state)
        self.figures.add_compilations(since=compiled)
        return state, info

    def is_warm(self, state: State, batch_shape: BatchShape) -> bool:
        return (batch_shape, state.rows.greedy) in self.warm_shapes

    def warm(self, state: State, batch_shape: BatchShape) -> State:
        """Compiles the steps of shapes that are new; sampled and greedy rows run different programs."""
        if self.is_warm(state, batch_shape):
            return state
        self.warm_shapes.add((batch_shape, state.rows.greedy))
        watch = Stopwatch()
        with bar("compile", None, "step", mode=self.progress, leave=False) as shown, ticking(shown):
            state = warm_up(state.runtime, state, on_step=shown.update)
        return_freed()  # before caches fill what the account promises them
        self.figures.add_warm_up(watch.seconds)
        _LOG.info(
            "compiled the steps of %d rows and %d positions in %.1f s", batch_shape.rows, batch_shape.positions, watch.seconds
        )
        return state
