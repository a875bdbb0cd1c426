"""Prompts by kind of text, and what every draft is worth on each.

The file has the form of Spec-Bench (Xia et al. 2024) and SPEED-Bench: JSON lines with a `category` and either `prompt` or `turns`,
of which the first is taken. The bundled prompts are our own, eight of each of Spec-Bench's six kinds.
"""

import pathlib

from specmoe_jax.benchmarks.rounds import Case, compare
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.jobs.prompts import load_line, read_lines
from specmoe_jax.support.errors import RequestError

BUNDLED = pathlib.Path(__file__).parent / "prompts" / "categories.jsonl"


def read_categories(path: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
    """{category: prompts}, in the order of the file. Raises RequestError that names file and line."""
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_lines(str(path)), 1):
        if line.strip():
            category, prompt = _parse(line, number, str(path))
            found[category] = (*found.get(category, ()), prompt)
    if not found:
        raise RequestError(f"prompts file {path} holds no prompt; give at least one")
    return found


def _parse(line: str, number: int, path: str) -> tuple[str, str]:
    try:
        given, where = load_line(line, number), f"{path}: line {number}"
    except RequestError as e:
        raise RequestError(f"{path}: {e}") from e
    if not isinstance(given, dict) or not isinstance(given.get("category"), str):
        raise RequestError(f"{where} has no category; it must be an object with category and prompt or turns")
    turns = given.get("turns")
    prompt = given.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(f"{where} has neither a prompt nor turns, or an empty one; give a text")
    return given["category"], prompt


def categories(s: Setting) -> dict:
    """Every draft by kind of text (--prompts): acceptance by position, bytes, speed; not among the default tables."""
    rows = {}
    for category, prompts in s.categories.items():
        job = s.job(len(prompts))._replace(prompts=prompts)
        for name, figures in compare(s.model, _cases(s, len(prompts)), job).items():
            said = {"case": name, "category": category, "batch": len(prompts)}
            rows[f"{category}: {name}"] = figures | accepted_by_position(figures) | said
    return rows


def accepted_by_position(figures: dict) -> dict:
    """Columns of the table: the share of rows whose first to fourth drafted token was accepted."""
    return {f"accepted_{n}": share for n, share in enumerate(figures["acceptance_by_position"][:4], 1)}


def _cases(s: Setting, batch: int) -> list[Case]:
    """Drafts of one length on demand and from the hot experts; those with weights of their own where the setting has them."""
    cases = [
        Case("on_demand", s.plan("on_demand", batch)),
        Case("ngram", s.ngram(batch, s.length), "on_demand"),
        Case("self", s.specmoe(batch), "on_demand"),
        Case("merged", s.specmoe(batch, draft="merged"), "on_demand"),
    ]
    for draft, head in s.heads.items():
        plan = s.plan("on_demand", batch, draft=draft, draft_length=s.length, synthetic_acceptance=s.acceptance)
        cases.append(Case(draft, plan, "on_demand", head))
    return cases
