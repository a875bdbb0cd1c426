"""A training run on disk: its checkpoints, its log, and how it goes on.

    work_dir/run.json            sizes and recipe of the run
    work_dir/log.jsonl           a line each LOG_EVERY steps, and the held-out figures
    work_dir/stable/STEP         Orbax checkpoints of warm-up and constant phase, the newest two
    work_dir/decay-STEP-N/...    a decay of N steps that began at the stable checkpoint STEP

The constant phase can always be taken up again, also after a decay has made a finished model of one of its checkpoints.
"""

import dataclasses
import json
import pathlib
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from specmoe_jax.support.errors import UserError
from specmoe_jax.support.progress import bar
from specmoe_jax.training import data
from specmoe_jax.training.witness import corpus, evaluate, export, loop, model
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig

LOG_EVERY = 10


class Texts(NamedTuple):
    """train [tokens]; held_out: corpus -> [tokens]; sizes [V]: bytes of a token; word_starts [V] bool."""

    train: np.ndarray
    held_out: dict[str, np.ndarray]
    sizes: np.ndarray
    word_starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """How often a run does what."""

    checkpoint_every_s: float = 600.0
    evaluate_every: int = 250  # steps
    evaluate_tokens: int = 8192  # of each corpus
    stop_after_s: float = float("inf")
    progress: str = "auto"


def read_texts(data_dir: pathlib.Path) -> Texts:
    held_out = {path.stem: np.load(path) for path in sorted((data_dir / "held_out").glob("*.npy"))}
    tokenizer, train = data_dir / "tokenizer.json", np.load(data_dir / "train.npy", mmap_mode="r")
    return Texts(train, held_out, sizes=evaluate.token_bytes(tokenizer), word_starts=corpus.word_starts(tokenizer))


def open_checkpoints(folder: pathlib.Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def newest_step(folder: pathlib.Path) -> int | None:
    if not folder.exists():
        return None
    with open_checkpoints(folder) as manager:
        return manager.latest_step()


def restore(folder: pathlib.Path, like: loop.TrainState) -> loop.TrainState:
    """The newest checkpoint under `folder`; `like` has its shapes."""
    with open_checkpoints(folder) as manager:
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    # Orbax commits arrays to a device; to jit those are other arguments than fresh ones, and a step would compile anew.
    return jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), found)


def check_run(work_dir: pathlib.Path, config: WitnessConfig, recipe: RecipeConfig, start_from: pathlib.Path | None) -> None:
    """Writes run.json, or refuses other sizes or another beginning than it has."""
    path = work_dir / "run.json"
    run = {"model": dataclasses.asdict(config), "start_from": start_from and str(start_from), "recipe": dataclasses.asdict(recipe)}
    if path.exists():
        before = json.loads(path.read_text())
        for name, what in (("model", "sizes"), ("start_from", "start_from")):
            if before.get(name) != run[name]:
                raise UserError(
                    f"{work_dir} holds a run of {name} {before.get(name)}, not {run[name]}; give the same {what} or another folder"
                )
    path.write_text(json.dumps(run, indent=2) + "\n")


def first_weights(config: WitnessConfig, recipe: RecipeConfig, start_from: pathlib.Path | None) -> tuple[model.Params, jax.Array]:
    """Random weights, or those that a run exported to `start_from`."""
    if start_from is None:
        return model.init_params(recipe.seed, config), model.init_bias(config)
    if (found := export.read_config(start_from)) != config:
        raise UserError(f"{start_from} holds a model of {found}, not of {config}; give its sizes")
    return export.read_checkpoint(start_from, config)


def finished(
    state: loop.TrainState, config: WitnessConfig, start_from: pathlib.Path | None, share: float
) -> tuple[model.Params, jax.Array]:
    """What a run exports: its average and, with a share below 1, the weights that it began with for the rest (WiSE-FT; Wortsman
    et al. 2022): between both, what was learnt last is mostly kept and what was lost is mostly back."""
    trained = state.ema, state.bias
    if share == 1 or start_from is None:
        return trained
    return jax.tree.map(lambda old, new: (1 - share) * old + share * new, export.read_checkpoint(start_from, config), trained)


def read_config(work_dir: pathlib.Path) -> WitnessConfig:
    return WitnessConfig(**json.loads((work_dir / "run.json").read_text())["model"])


def phase(work_dir: pathlib.Path, recipe: RecipeConfig) -> tuple[pathlib.Path, pathlib.Path | None, RecipeConfig]:
    """Where this phase's checkpoints are, which folder it begins from when it has none, and its recipe.

    A decay begins at the newest stable checkpoint; one that has begun is gone on with.
    """
    stable = work_dir / "stable"
    if not recipe.decay_steps:
        return stable, None, recipe
    begun = sorted(work_dir.glob(f"decay-*-{recipe.decay_steps}"), key=lambda path: int(path.name.split("-")[1]))
    start = int(begun[-1].name.split("-")[1]) if begun else newest_step(stable)
    if start is None:
        raise UserError(f"there is nothing to decay from: {stable} has no checkpoint; train without decay_steps first")
    return work_dir / f"decay-{start}-{recipe.decay_steps}", stable, dataclasses.replace(recipe, stable_steps=start)


class Stop:
    """True once the process was asked to end: the step in progress is finished and saved."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True


def write_line(path: pathlib.Path, **figures) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({"unix_s": round(time.time(), 1)} | figures) + "\n")


def quick_figures(state: loop.TrainState, texts: Texts, config: WitnessConfig, recipe: RecipeConfig, tokens: int) -> dict:
    """Held-out figures of the average, on the first `tokens` of each corpus; a capacity of 4 is as good as none here."""
    return evaluate.summary(
        state.ema, state.bias, texts.held_out, texts.sizes, config=config, length=recipe.length, limit=tokens, capacity_factor=4.0
    )


def prompts_at(tokens: np.ndarray, step: int, recipe: RecipeConfig) -> np.ndarray:
    """Training text that the model is to continue before a step -> [n, repeat_prompt] int32; another order than the batches'."""
    rows, length = loop.continued_shape(recipe)[0], recipe.repeat_prompt - 1
    return data.batch_at(tokens, step // recipe.repeat_every, batch_size=rows, length=length, seed=recipe.seed + 1)


def train(
    config: WitnessConfig,
    recipe: RecipeConfig,
    work_dir: pathlib.Path,
    texts: Texts,
    rhythm: Rhythm,
    start_from: pathlib.Path | None = None,
) -> loop.TrainState:
    """Runs the remaining steps of the phase; saves each `checkpoint_every_s`, when it is asked to stop, and at the end.

    start_from: an exported checkpoint whose weights a new run begins with, under a fresh optimiser; a run that has begun goes on.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    check_run(work_dir, config, recipe, start_from)
    folder, origin, recipe = phase(work_dir, recipe)
    begin = folder if newest_step(folder) is not None else origin
    state = loop.init_state(*first_weights(config, recipe, start_from), recipe)
    if begin is not None:
        state = restore(begin, state)
    word_starts = jnp.asarray(texts.word_starts)
    log, stop, began_s = work_dir / "log.jsonl", Stop(), time.monotonic()
    last_step, saved_s = recipe.stable_steps + recipe.decay_steps, time.monotonic()
    with (
        open_checkpoints(folder) as manager,
        bar("train", last_step, "step", mode=rhythm.progress, initial=int(state.step)) as shown,
    ):

        def save():
            if manager.latest_step() != int(state.step):
                manager.save(int(state.step), args=ocp.args.StandardSave(state))

        for step in range(int(state.step), last_step):
            # Two tokens more than the main loss needs would overlap the next window: windows are one longer than `length`.
            batch = data.batch_at(texts.train, step, batch_size=recipe.batch_size, length=recipe.length + 1, seed=recipe.seed)
            if recipe.repeat_weight and step % recipe.repeat_every == 0:
                state = loop.with_continuations(state, prompts_at(texts.train, step, recipe), config, recipe)
            state, info = loop.train_step(state, batch, loop.rates(recipe, step), word_starts, config=config, recipe=recipe)
            if step % LOG_EVERY == 0:
                figures = {name: round(float(value), 4) for name, value in info._asdict().items()}
                write_line(log, step=step, cpu_s=round(time.process_time(), 1), **figures)
                shown.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in figures.items()), refresh=False)
            shown.update()
            if (step + 1) % rhythm.evaluate_every == 0:
                write_line(log, step=step + 1, held_out=quick_figures(state, texts, config, recipe, rhythm.evaluate_tokens))
            if time.monotonic() - saved_s > rhythm.checkpoint_every_s:
                save()
                saved_s = time.monotonic()
            if stop.asked or time.monotonic() - began_s > rhythm.stop_after_s:
                break
        jax.block_until_ready(state)
        save()
    return state
