"""A short run on the user's prompts: how much of each draft is accepted, and how skewed the routing is (SpecMoEOff 5.3, step 3)."""

import itertools
from collections.abc import Sequence

import numpy as np

from specmoe_jax.checkpoints.manifest import checkpoint_hash
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.planner.calibration import Acceptance, Calibration, counted_skew, fitted_shares, unlike_rows
from specmoe_jax.planner.search import tree
from specmoe_jax.planner.workload import acceptance_rate
from specmoe_jax.speculate.drafts.ngram import NgramDraft, lookup
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.support.cache_files import read_cached, write_cached

ROWS, NEW_TOKENS, LENGTH = 8, 32, 4


def calibrate(model: Model, prompts: Sequence, params: SamplingParams, *, head: EagleHead | None = None) -> Calibration:
    """Runs at most ROWS prompts for NEW_TOKENS tokens; the result is kept for this checkpoint.

    The self-draft's and a head's rates (its trees' too) are those of real drafts; of prompt lookup
    those that it would have had on the texts.
    """
    prompts = list(prompts[:ROWS])
    plan = preset("specmoe", model.config).replace(batch_size=len(prompts), draft_length=LENGTH, dtype=model.dtype)
    engine, seen, steps = Engine(model, plan), [], np.zeros(len(prompts))
    counts = np.zeros((model.config.num_moe_layers, model.config.num_experts), np.int64)

    def count(info) -> None:
        steps[: len(info.active)] += info.active

    def on_step(info) -> None:
        count(info)
        ids = info.verify.routing[:, info.active]  # [L, B, T, A]
        for rows, new in itertools.product(range(1, ids.shape[1] + 1), (1, 2, ids.shape[2])):
            seen.append((rows, new, np.mean([len(np.unique(layer[:rows, :new])) for layer in ids])))
        kept = np.arange(info.verify.routing.shape[2]) < info.committed[:, None]  # [B, T]
        counts[:] += [count_choices(ids[kept], counts.shape[1]) for ids in info.verify.routing]

    limited = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=params.temperature, seed=params.seed, ignore_eos=True)
    done = engine.generate(prompts, limited, on_step=on_step)
    acceptance = {"self": _acceptance(_rate(engine.stats()), steps)._replace(experts=plan.draft_experts)}
    found = _lookup_rates(model, prompts, done)
    each = [sum(rate**j for j in range(LENGTH + 1)) for rate in found]
    acceptance["ngram"] = _acceptance(float(np.mean(found)), NEW_TOKENS / np.array(each))
    if head is not None:
        for name, fields in (("eagle", {"draft_length": LENGTH}), ("eagle_tree", tree(LENGTH))):
            eagle = Engine(model, preset("resident", model.config).replace(**_eagle(plan), **fields), draft_head=head)
            steps[:] = 0
            eagle.generate(prompts, limited, on_step=count)
            acceptance[name] = _acceptance(_rate(eagle.stats()), steps)
    skew = counted_skew(model.config, counts)
    row_share, run_share = fitted_shares(model.config, skew, seen)
    found = Calibration(acceptance=acceptance, skew=skew, measured=True, row_share=row_share, run_share=run_share)
    if model.path is not None:
        write_cached("calibration", checkpoint_hash(model.path), found.to_dict())
    return found


def cached_calibration(path) -> Calibration | None:
    """What an earlier `calibrate` found for a checkpoint directory."""
    return Calibration.from_dict(read_cached("calibration", checkpoint_hash(path)) or {})


def _eagle(plan) -> dict:
    return {"draft": "eagle", "batch_size": plan.batch_size, "dtype": plan.dtype}


def _acceptance(rate: float, steps: np.ndarray) -> Acceptance:
    """steps: [rows], that each row took."""
    return Acceptance(rate, unlike=unlike_rows(steps, rate, LENGTH, NEW_TOKENS))


def _rate(stats: dict) -> float:
    return acceptance_rate(sum(stats["acceptance_by_position"]), LENGTH)


def _lookup_rates(model: Model, prompts: list, done) -> list[float]:
    """Of the tokens that prompt lookup proposes one by one along each of the generated texts, the share that came."""
    rates = []
    for prompt, completion in zip(prompts, done, strict=True):
        ids = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        tokens = completion.token_ids
        guesses = [lookup((*ids, *tokens[:i]), 1, NgramDraft().longest)[0] for i in range(len(tokens))]
        rates.append(sum(guess == token for guess, token in zip(guesses, tokens, strict=True)) / max(len(tokens), 1))
    return rates
