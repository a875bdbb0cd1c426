"""The planner's choice, for every command that runs without --preset and --plan."""

import pathlib
import sys
import textwrap

from specmoe_jax.autotune import choose as planning
from specmoe_jax.checkpoints.eagle import bundled_head
from specmoe_jax.checkpoints.files import read_json
from specmoe_jax.checkpoints.published.quantisation import named_type
from specmoe_jax.cli.shown.wrapped_text import WIDTH
from specmoe_jax.config.plan import Plan
from specmoe_jax.jobs.job import ModelHead
from specmoe_jax.support.errors import PlanError


def chosen_plan(
    head: ModelHead,
    folder: pathlib.Path,
    job: planning.Job,
    *,
    requests: int,
    fixed: dict,
    model: str,
    draft_head: str | None,
    draft_model: str | None,
    progress: str,
) -> Plan:
    """The plan that the planner predicts to be the fastest on this machine, reported in a line, and in another the dtype that was
    not asked for where the checkpoint is smaller than what is computed with.

    fixed: fields that are given. model, draft_head, draft_model: values of the flags of these names. Raises PlanError.
    """
    if draft_model:
        raise PlanError("--draft_model leaves the planner nothing to choose; name a preset, for example --preset=on_demand")
    fixed = fixed | ({"draft": "eagle"} if draft_head else {})
    known = planning.know(head.config, fixed.get("dtype", "float32"), folder, job, progress=progress)
    found = planning.choose(head.config, known, requests=requests, fixed=fixed, head=bool(draft_head or bundled_head(model)))
    by = "" if known.operators else ", by this machine's rates alone: specmoe plan measures the model"
    lines = [f"auto: {planning.as_line(found)}{by}"]
    if "dtype" not in fixed and named_type(read_json(folder / "config.json")).removeprefix("torch.") == "bfloat16":
        lines.append("in float32, where speculation changes no token; --dtype=bfloat16, as the checkpoint is, reads half as much")
    print("\n".join(textwrap.fill(line, WIDTH) for line in lines), file=sys.stderr)
    return found.best.plan
