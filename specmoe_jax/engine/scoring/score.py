"""The log-probability of continuations: every text of a job is read once, many at a time."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.flows.layer_passes import fetched
from specmoe_jax.engine.flows.protocol import ExpertFlowExecutor
from specmoe_jax.engine.requests.prepare import BatchShape
from specmoe_jax.engine.scoring.layout import Layout, Query, ReadPass, ReadRow, layout, row_positions
from specmoe_jax.engine.scoring.logprobs import positions_at_once, score_states
from specmoe_jax.engine.scoring.prefixes import share_prefixes
from specmoe_jax.engine.scoring.texts import ScoredText
from specmoe_jax.engine.session import Session
from specmoe_jax.kv_cache.positions import KV_PAGE, pages_of
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.planner.memory.account import cache_positions
from specmoe_jax.planner.memory.footprint import position_bytes, token_numbers
from specmoe_jax.planner.memory.memory_account import PagedLoad
from specmoe_jax.support.host_memory import available_bytes
from specmoe_jax.support.progress import bar
from specmoe_jax.support.timing import Stopwatch

CACHE_SHARE = 0.5  # of the free host memory, for the cache of a plan without a budget for it


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one continuation given its context.

    token_ids: of the continuation. logprobs: of each, natural logarithms under the model's own distribution (no temperature).
    is_greedy: whether each is the most likely one.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def sum(self) -> float:
        """The log-probability of the whole continuation."""
        return float(np.sum(self.logprobs, dtype=np.float64))


def score_texts(session: Session, flow: ExpertFlowExecutor, texts: Sequence[ScoredText]) -> list[Score]:
    """In the order of the texts. Requests of the engine that are running are not touched."""
    watch, config = Stopwatch(), session.model.config
    # Chunks that attend on the accelerator reach the cache after their layer, too late for trees of the same pass. A state has
    # no pages that several rows could read.
    share = session.plan.prefill_attention != "accelerator" and not config.recurrent_layers
    reading = layout(texts, share=share)
    columns = _power_of_two(max(len({query.token for query in queries}) for queries in reading.queries.values()))
    logprobs = [np.zeros(len(text.continuation)) for text in texts]
    greedy = [np.zeros(len(text.continuation), bool) for text in texts]
    if share and session.plan.flow.streams_layers:  # of a paged cache
        reading = reading._replace(rows=share_prefixes(reading.rows, reading.unscored))
    total = sum(row.num_read for row in reading.rows)
    with bar("score", total, "tok", mode=session.progress, leave=False) as shown:
        for one, h, _ in flow.read(session, reading.rows, read_shape(config, session.plan, reading.rows)):
            for query, logprob, best in _answers(session, reading, one, h, columns):
                logprobs[query.text][query.index], greedy[query.text][query.index] = logprob, best == query.token
            shown.update(int(one.num_new.sum()))
    session.figures.add_scores(sum(map(len, logprobs)), total, watch.seconds)
    return [
        Score(text.continuation, tuple(values.tolist()), bool(best.all()))
        for text, values, best in zip(texts, logprobs, greedy, strict=True)
    ]


def _answers(session: Session, reading: Layout, one: ReadPass, h: jax.Array, columns: int) -> Iterator[tuple[Query, float, int]]:
    """Of every query about a pass: its log-probability, and the most likely token in its place."""
    config, runtime = session.model.config, session.resources.runtime
    assert runtime is not None  # of the pass
    asked = [(position, reading.queries[place]) for position, place in one.places() if place in reading.queries]
    size = min(positions_at_once(config.vocab_size), one.tokens.size)
    h = fetched(h) if asked else h  # once, not for every few positions
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        index, tokens = np.zeros(size, np.int32), np.zeros((size, columns), np.int32)
        index[: len(some)] = [position for position, _ in some]
        distinct = [list(dict.fromkeys(query.token for query in queries)) for _, queries in some]
        for n, own in enumerate(distinct):
            tokens[n, : len(own)] = own
        found = jax.device_get(score_states(config.head, runtime.weights, h, index, tokens, 0))
        for n, (_, queries) in enumerate(some):
            for query in queries:
                yield query, float(found.of[n, distinct[n].index(query.token)]), int(found.best[n])


def read_shape(config: ModelConfig, plan: Plan, rows: Sequence[ReadRow]) -> BatchShape:
    """The compiled shapes of a job that reads rows; a paged cache holds as many of them at a time as host memory does."""
    chain, longest = max(len(row.chain) for row in rows), max(map(row_positions, rows))
    paged = plan.flow.paged_load(plan, [(row_positions(row) - row.shared, 0) for row in rows], len(rows))
    source = max(len(row.source) for row in rows)
    return BatchShape(
        rows=plan.flow.batch_rows(plan, min(plan.batch_size, len(rows))),
        positions=cache_positions(longest, plan),
        chunk=min(plan.prefill_chunk, _power_of_two(max(chain, 1))),
        paged=paged and _held(config, plan, paged, pages_of(longest)),
        source=source and max(8, _power_of_two(source)),
    )


def _held(config: ModelConfig, plan: Plan, paged: PagedLoad, least: int) -> PagedLoad:
    """What of a load may be in host memory at a time; a plan's own budget is the account's business."""
    available = available_bytes()
    if plan.host_memory_bytes is not None or available is None:
        return paged
    itemsize = DTYPE_BYTES[plan.dtype]
    hidden = (config.state_numbers + max(map(token_numbers, config.layers))) * itemsize
    pages = max(int(CACHE_SHARE * available) // (KV_PAGE * (position_bytes(config, itemsize) + hidden)), least)
    if pages >= paged.pages:
        return paged
    pages = max(1 << (pages.bit_length() - 1), least)  # free memory changes all the time, compiled shapes should not
    return PagedLoad(pages=pages, prompt_tokens=min(paged.prompt_tokens, pages * KV_PAGE))


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()
