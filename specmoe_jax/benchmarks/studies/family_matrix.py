"""Every family under every preset and with every draft, on both KV tiers, one request at a time and eight ragged ones: are the
tokens those of the resident preset?

    XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
        python -m specmoe_jax.benchmarks.studies.family_matrix --output=matrix.jsonl

The flags halve the processor time, nearly all of which is compilation. The families are the tiny ones of specmoe_jax.testing,
with a layer for further tokens where they can have one. What the plan refuses is counted without running. Each line of the
output is a case; one that is there is not run again. Every family first gets each preset with each draft once, tiers and
batches going round, then the others. The reference itself is compared with the forward without a cache. Two tokens whose logits
differ by less than NEAR are a tie, which rounding may decide either way.
"""

import collections
import functools
import gc
import itertools
import json
import pathlib
import textwrap
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS, KV_TIERS
from specmoe_jax.models import mtp
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.support.errors import PlanError, UserError
from specmoe_jax.support.jax_settings import use_compile_cache
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS, WITH_TOWERS

FAMILIES = RAW_CONFIGS | WITH_TOWERS | ENCODER_DECODERS
FURTHER = {"num_nextn_predict_layers": 1}  # which some families have without saying so, and others ignore
CHAIN = {"draft_length": 2}
TREE = CHAIN | {"draft_tree_top_k": 2, "draft_tree_tokens": 4}


class Drafted(NamedTuple):
    """fields: of the plan. with_experts: as many draft experts as a token chooses. given: what the engine needs beside the plan,
    of a model; None for what the draft's executor says."""

    fields: dict
    with_experts: bool = False
    given: Callable[[Model], dict] | None = None


DRAFTED = {
    "none": Drafted({}),
    "self": Drafted(CHAIN, with_experts=True),
    "merged": Drafted(CHAIN, with_experts=True),
    "eagle": Drafted(CHAIN),
    "eagle tree": Drafted(TREE),
    "mtp": Drafted(CHAIN),
    "mtp tree": Drafted(TREE),
    "mtp hot": Drafted(CHAIN, with_experts=True, given=lambda model: {"mtp_head": mtp.random_head(model, experts_on_host=True)}),
    "ngram": Drafted(CHAIN),
    "model": Drafted(CHAIN, given=lambda model: {"draft_model": model}),  # the target itself, whose tokens are all accepted
}
LENGTHS = (9, 1, 14, 30, 2, 5, 17, 3, 4, 11)  # of the prompts
PLACES = {1: (0, 2), 8: tuple(range(8))}  # of those that are run, by rows that generate together
REFILLED = (8, 9)  # they join when others end, where the flow has that
NEW_TOKENS = (6, 4, 5)  # in turn, so that rows end at unlike times
NEAR = 1e-5
MAPS = 20_000  # a compiled program takes 20 to 40 memory maps; Linux gives a process 65,530
OUTCOMES = ("equal", "tie", "refused", "unequal", "crash")
WIDTH = 80  # of the table

PROMPTS = [np.random.default_rng([8, i]).integers(3, 131, length).tolist() for i, length in enumerate(LENGTHS)]
PARAMS = [sm.SamplingParams(max_new_tokens=NEW_TOKENS[i % 3], ignore_eos=True) for i in range(len(LENGTHS))]


class Case(NamedTuple):
    """batch: rows that generate together."""

    family: str
    preset: str
    draft: str
    tier: str
    batch: int


class Found(NamedTuple):
    """outcome: one of OUTCOMES. why: the refusal, the first difference or the exception. accepted: drafted tokens of a step."""

    outcome: str
    why: str = ""
    accepted: float | None = None


@functools.cache
def rounds(family: str) -> list[list[Case]]:
    """Each has every preset with every draft once, on another tier and with another batch; what the plan refuses comes last."""
    settings = list(itertools.product(KV_TIERS, PLACES))
    turn, found = list(FAMILIES).index(family), []
    for (i, preset), (j, draft) in itertools.product(enumerate(sm.PRESETS), enumerate(DRAFTED)):
        first = (turn + i + j) % len(settings)
        cases = [Case(family, preset, draft, *setting) for setting in (*settings[first:], *settings[:first])]
        found.append(sorted(cases, key=lambda case: refusal(case) is not None))
    return list(map(list, zip(*found, strict=True)))


@functools.cache
def model_of(family: str) -> Model:
    return random_model(parse_config(FAMILIES[family] | FURTHER))


def plan_of(case: Case) -> sm.Plan:
    """Of small chunks, so that prompts have several."""
    config, drafted = model_of(case.family).config, DRAFTED[case.draft]
    plan = sm.PRESETS[case.preset](config).replace(draft_length=None, draft_experts=None)
    plan = plan.replace(draft=case.draft.split()[0], batch_size=case.batch, kv_tier=case.tier, prefill_chunk=8)
    plan = plan.replace(**drafted.fields, micro_batches=min(plan.micro_batches, case.batch))
    if drafted.with_experts:
        plan = plan.replace(draft_experts=config.experts_per_token)
    return plan.replace(link_bytes_per_s=1e12) if plan.prefetch == "oracle" else plan


@functools.cache
def reference(family: str) -> list[tuple[int, ...]]:
    """Tokens of every prompt by the resident preset. Raises AssertionError where they are not the forward's argmax."""
    model = model_of(family)
    plan = plan_of(Case(family, "resident", "none", "accelerator", 8))
    found = [done.token_ids for done in sm.Engine(model, plan).generate(PROMPTS, PARAMS)]
    for text, tokens in zip(PROMPTS, found, strict=True):
        for count, (token, logits) in enumerate(zip(tokens, logits_of(model, text, tokens), strict=True)):
            assert logits.max() - logits[token] < NEAR, f"{family}: the reference is not the argmax after {count} tokens"
    return found


def logits_of(model: Model, text: list[int], tokens: tuple[int, ...]) -> np.ndarray:
    """[tokens, V], of which each was chosen, by the forward without a cache, padded to one shape."""
    width, encoder = max(LENGTHS) + max(NEW_TOKENS), model.config.encoder
    begun = text if encoder is None else list(encoder.start)
    source = () if encoder is None else (padded(text, width), np.array([len(text)], np.int32))
    logits = np.asarray(model.logits(padded([*begun, *tokens], width), *source))[0]
    return logits[len(begun) - 1 :][: len(tokens)]


def padded(row: list[int], width: int) -> np.ndarray:
    """[1, width] int32."""
    return np.array([row + [0] * (width - len(row))], np.int32)


def given_to(model: Model, case: Case) -> dict:
    """What the engine needs beside the plan, of random weights."""
    given = DRAFTED[case.draft].given
    return given(model) if given else DRAFTS.executor(case.draft.split()[0]).random_inputs(model)


def run(case: Case, plan: sm.Plan) -> Found:
    model, wanted = model_of(case.family), reference(case.family)
    places = PLACES[case.batch] + (REFILLED if plan.flow.streams_layers and case.batch > 1 else ())
    try:
        engine = sm.Engine(model, plan, **given_to(model, case))
        done = engine.generate([PROMPTS[i] for i in places], [PARAMS[i] for i in places])
    except UserError as e:
        return Found("refused", str(e))
    except Exception as e:  # whatever it is, the other cases are run too
        traceback.print_exc()
        return Found("crash", f"{type(e).__name__}: {e}".splitlines()[0])
    figures = engine.stats()
    accepted = round(sum(figures["acceptance_by_position"]), 3) if plan.draft_length else None
    for place, completion in zip(places, done, strict=True):
        if completion.token_ids != wanted[place]:
            return difference(model, place, completion.token_ids, wanted[place])
    if late := figures["compilations_after_warmup"]:
        return Found("crash", f"{late} programs were compiled after the warm-up")
    return Found("equal", accepted=accepted)


def difference(model: Model, place: int, ours: tuple[int, ...], wanted: tuple[int, ...]) -> Found:
    """The first one, with the distance of the two tokens' logits."""
    at = next((i for i, (a, b) in enumerate(zip(ours, wanted, strict=False)) if a != b), None)
    if at is None:
        return Found("unequal", f"prompt {place}: {len(ours)} tokens instead of {len(wanted)}")
    logits = logits_of(model, PROMPTS[place], wanted)[at]
    gap = abs(float(logits[wanted[at]] - logits[ours[at]]))
    said = f"prompt {place}, token {at}: {ours[at]} instead of {wanted[at]}, whose logits differ by {gap:.2g}"
    return Found("tie" if gap < NEAR else "unequal", said)


def refusal(case: Case) -> str | None:
    """Why the plan cannot run; None if it can."""
    try:
        plan_of(case).validate(model_of(case.family).config)
    except PlanError as e:
        return str(e)
    return None


def study(families: list[str], output: pathlib.Path) -> dict[Case, Found]:
    """Adds what the output lacks, the refusals of plans first, and returns all of it."""
    done, order = read(output), [*itertools.chain(*zip(*map(rounds, families), strict=True))]
    alike = {what_runs(case): found for case, found in done.items()}
    with output.open("a", encoding="utf-8") as file:

        def add(case: Case, found: Found) -> None:
            done[case] = found
            file.write(json.dumps(case._asdict() | found._asdict()) + "\n")
            file.flush()

        for case in (case for case in itertools.chain(*order) if case not in done):
            if why := refusal(case):
                add(case, Found("refused", why))
        for cases in order:
            for case in (case for case in cases if case not in done):
                found = alike[what_runs(case)] = alike.get(what_runs(case)) or run(case, plan_of(case))
                add(case, found)
                if found.outcome not in ("equal", "refused"):
                    print(*case, *found, flush=True)
            let_go()
            print(cases[0].family, dict(collections.Counter(found.outcome for found in done.values())), flush=True)
    return done


def what_runs(case: Case) -> tuple[str, sm.Plan]:
    """Cases that differ in the name of their preset alone are one."""
    return case.family, plan_of(case).replace(preset="")


def read(output: pathlib.Path) -> dict[Case, Found]:
    if not output.exists():
        return {}
    lines = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return {Case(*(line[name] for name in Case._fields)): Found(*(line[name] for name in Found._fields)) for line in lines}


def let_go() -> None:
    """Programs, before a process has more of them than memory maps."""
    if len(pathlib.Path("/proc/self/maps").read_bytes().splitlines()) > MAPS:
        jax.clear_caches()
        gc.collect()


def table(done: dict[Case, Found], families: list[str]) -> str:
    """Of each family how many cases had which outcome, then the reasons and differences in full."""
    lines = ["".join([f"{'family':<16}", *(f"{name:>10}" for name in (*OUTCOMES, "not run"))])]
    for family in families:
        counts = collections.Counter(found.outcome for case, found in done.items() if case.family == family)
        left = sum(map(len, rounds(family))) - counts.total()
        lines.append("".join([f"{family:<16}", *(f"{count:>10}" for count in (*(counts[name] for name in OUTCOMES), left))]))
    reasons = collections.defaultdict(list)
    for case, found in done.items():
        if found.why and case.family in families:
            kind = found.why if found.outcome == "refused" else f"{found.outcome}, {' '.join(map(str, case))}: {found.why}"
            reasons[kind].append(case)
    for kind, cases in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines += ["", *textwrap.wrap(f"{len(cases)} in {len({case.family for case in cases})} families: {kind}", WIDTH)]
    return "\n".join(lines)


def main(_) -> None:
    use_compile_cache()
    families = flags.FLAGS.families or list(FAMILIES)
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise UserError(f"families has {', '.join(unknown)}; they are {', '.join(FAMILIES)}")
    print(table(study(families, pathlib.Path(flags.FLAGS.output)), families))


if __name__ == "__main__":
    flags.DEFINE_string(
        "output", None, "Where each case becomes a line of JSON; those that are there are not run again.", required=True
    )
    flags.DEFINE_list("families", [], "Default: all.")
    app.run(main)
