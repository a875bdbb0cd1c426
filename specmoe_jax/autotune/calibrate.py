"""A short run on the user's prompts: the acceptance of each draft, and the skew of the routing (SpecMoEOff 5.3, step 3)."""

import itertools
from collections.abc import Sequence

import numpy as np

from specmoe_jax.checkpoints.manifest import checkpoint_hash
from specmoe_jax.config.presets import preset
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.engine.engine import Engine
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.planner.calibration import Acceptance, Calibration, counted_skew, fitted_shares, unlike_rows
from specmoe_jax.planner.workload import acceptance_rate
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.support.cache_files import read_cached, write_cached
from specmoe_jax.support.jax_settings import lenient

ROWS, NEW_TOKENS, LENGTH = 8, 32, 4


@lenient()
def calibrate(
    model: Model,
    prompts: Sequence,
    params: SamplingParams,
    *,
    head: EagleHead | None = None,
    mtp_head: MtpHead | None = None,
) -> Calibration:
    """Runs at most ROWS prompts for NEW_TOKENS tokens; the result is kept for this checkpoint.

    The self-draft's, a head's (its trees' too) and the model's own layer's rates are those of real drafts; of prompt lookup
    those that it would have reached on the texts.
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
    acceptance = {plan.drafting.name: _acceptance(_rate(engine.stats()), steps)._replace(experts=plan.draft_experts)}
    acceptance |= _rates_on_texts(model, prompts, done)
    inputs = DraftInputs(draft_head=head, mtp_head=mtp_head)
    resident = preset("resident", model.config).replace(batch_size=plan.batch_size, dtype=plan.dtype)
    runs = [run for name in DRAFTS for run in DRAFTS.executor(name).calibration_runs(inputs, LENGTH).items()]
    for name, fields in runs:
        own_plan = resident.replace(**fields)
        given = own_plan.drafting.given
        own = Engine(model, own_plan, **({given: getattr(inputs, given)} if given else {}))
        steps[:] = 0
        own.generate(prompts, limited, on_step=count)
        acceptance[name] = _acceptance(_rate(own.stats()), steps)
    skew = counted_skew(model.config, counts)
    row_share, run_share = fitted_shares(model.config, skew, seen)
    found = Calibration(acceptance=acceptance, skew=skew, measured=True, row_share=row_share, run_share=run_share)
    if model.path is not None and model.adapter is None:
        write_cached("calibration", checkpoint_hash(model.path), found.to_dict())
    return found


def cached_calibration(path) -> Calibration | None:
    """What an earlier `calibrate` found for a checkpoint directory; None where it names a draft that is not registered any more."""
    found = Calibration.from_dict(read_cached("calibration", checkpoint_hash(path)) or {})
    return found if found and all(name.removesuffix("_tree") in DRAFTS for name in found.acceptance) else None


def _acceptance(rate: float, steps: np.ndarray) -> Acceptance:
    """steps: [rows], that each row took."""
    return Acceptance(rate, unlike=unlike_rows(steps, rate, LENGTH, NEW_TOKENS))


def _rate(stats: dict) -> float:
    return acceptance_rate(sum(stats["acceptance_by_position"]), LENGTH)


def _rates_on_texts(model: Model, prompts: list, done) -> dict[str, Acceptance]:
    """Of the drafts whose proposals follow from the text alone, without a run of their own."""
    texts = [
        (tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt), completion.token_ids)
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    found = {}
    for name in DRAFTS:
        rates = [DRAFTS.executor(name).rate_on_text(*text) for text in texts]
        if None not in rates:
            each = [sum(rate**j for j in range(LENGTH + 1)) for rate in rates]
            found[name] = _acceptance(float(np.mean(rates)), NEW_TOKENS / np.array(each))
    return found
