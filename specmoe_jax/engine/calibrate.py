"""A short run on the user's prompts: how much of each draft is accepted, and how skewed the routing is (SpecMoEOff 5.3, step 3)."""

import itertools
from collections.abc import Sequence

import numpy as np

from specmoe_jax.cache_files import read_cached, write_cached
from specmoe_jax.checkpoints.manifest import checkpoint_hash
from specmoe_jax.config import SamplingParams, preset
from specmoe_jax.engine.generate import Engine
from specmoe_jax.models.eagle import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.planner.calibration import Acceptance, Calibration, counted_skew, fitted_shares
from specmoe_jax.speculate.hotness import count_choices
from specmoe_jax.speculate.ngram import NgramDraft, lookup

ROWS, NEW_TOKENS, LENGTH = 8, 32, 4


def calibrate(model: Model, prompts: Sequence, params: SamplingParams, *, head: EagleHead | None = None) -> Calibration:
    """Runs at most ROWS prompts for NEW_TOKENS tokens; the result is kept for this checkpoint.

    The self-draft's and a head's rates are those of real drafts; of prompt lookup those that it would have had on the texts.
    """
    prompts = list(prompts[:ROWS])
    plan = preset("specmoe", model.config).replace(batch_size=len(prompts), draft_length=LENGTH, dtype=model.dtype)
    engine, seen = Engine(model, plan), []
    counts = np.zeros((model.config.num_moe_layers, model.config.num_experts), np.int64)

    def on_step(info) -> None:
        ids = info.verify.routing[:, info.active]  # [L, B, T, A]
        for rows, new in itertools.product(range(1, ids.shape[1] + 1), (1, 2, ids.shape[2])):
            seen.append((rows, new, np.mean([len(np.unique(layer[:rows, :new])) for layer in ids])))
        kept = np.arange(info.verify.routing.shape[2]) < info.committed[:, None]  # [B, T]
        counts[:] += [count_choices(ids[kept], counts.shape[1]) for ids in info.verify.routing]

    limited = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=params.temperature, seed=params.seed, ignore_eos=True)
    done = engine.generate(prompts, limited, on_step=on_step)
    acceptance = {"self": Acceptance(_rate(engine.stats()), experts=plan.draft_experts)}
    acceptance["ngram"] = Acceptance(_lookup_rate(model, prompts, done))
    if head is not None:
        eagle = Engine(model, preset("resident", model.config).replace(**_eagle(plan)), draft_head=head)
        eagle.generate(prompts, limited)
        acceptance["eagle"] = Acceptance(_rate(eagle.stats()))
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
    return {"draft": "eagle", "draft_length": LENGTH, "batch_size": plan.batch_size, "dtype": plan.dtype}


def _rate(stats: dict) -> float:
    """The conditional acceptance that gives the mean accepted tokens (Leviathan et al. 2023, Eq. 1, solved for the rate)."""
    accepted = sum(stats["acceptance_by_position"])
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(1, LENGTH + 1)) < accepted else (low, middle)
    return low


def _lookup_rate(model: Model, prompts: list, done) -> float:
    """Of the tokens that prompt lookup proposes one by one along the generated texts, the share that came."""
    right = tried = 0
    for prompt, completion in zip(prompts, done, strict=True):
        ids = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        for i, token in enumerate(completion.token_ids):
            (guess,) = lookup((*ids, *completion.token_ids[:i]), 1, NgramDraft().longest)
            right, tried = right + (guess == token), tried + 1
    return right / max(tried, 1)
