"""A job on a Ray cluster: the class of actors for `map_batches` of Ray Data. It needs pyarrow, and Ray only around it.

    dataset.map_batches(Answers, fn_constructor_kwargs={"model": "DIR", "journals": "/shared/job"}, batch_format="pyarrow",
                        batch_size=256, concurrency=4, num_gpus=1)

Each actor keeps one engine. Each batch is a job with a journal of its own: where Ray runs a batch again because its worker died,
the answers that were finished are read, not generated again.
"""

import contextlib
import hashlib
import json
import pathlib
from typing import Any

from specmoe_jax.checkpoints import load_model
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.prepare import refusal
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import Prompt, as_chat, prompts_of
from specmoe_jax.jobs.tables import table_of, without_nulls
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_whole

BAD_ROWS: dict[str, Any] = {"keep_bad": True, "source": "the batch"}


class Answers:
    """Rows with `index` and `prompt` or `messages` -> their answers, in the order of `index`.

    `index` is the number of the request in the whole job, which sampling is keyed by: answers do not depend on how the rows are
    split into batches. Other columns are those of a prompts file (docs/formats.md), those of the result of a job's output.
    """

    def __init__(
        self,
        model: str,
        journals: str,
        plan: str | Plan = "specmoe",
        *,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (immutable)
        chat: bool = False,
    ):
        """model: as of `--model`. journals: a folder that all workers see. plan: a preset or a plan. chat: as of `--chat`."""
        dtype = "float32" if isinstance(plan, str) else plan.dtype
        tier = "host" if isinstance(plan, str) else plan.expert_tier
        self._model = load_model(model, dtype=dtype, expert_tier=tier)
        self._engine = Engine(self._model, preset(plan, self._model.config) if isinstance(plan, str) else plan)
        self._journals, self._params, self._chat = pathlib.Path(journals), params, chat
        self._journals.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Any) -> Any:
        """batch, result: a pyarrow.Table. Raises RequestError for rows without an `index`, and while another worker has them."""
        numbered = self._prompts(batch.to_pylist())
        identity = self._identity(numbered)
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        output = str(self._journals / f"{min(numbered):09d}-{name}.jsonl")
        with contextlib.closing(Journal(output, identity)) as journal:
            self._run(numbered, journal)
        return table_of(output)

    def _prompts(self, rows: list[dict[str, Any]]) -> dict[int, Prompt]:
        rows = [without_nulls(row) for row in rows]
        numbers = [row.pop("index", None) for row in rows]
        if not all(is_whole(number) and number >= 0 for number in numbers) or len(set(numbers)) < len(numbers):
            raise RequestError("the column index must number each row of the whole job, from 0 on; add it before map_batches")
        prompts = prompts_of(({"id": number} | row for number, row in zip(numbers, rows, strict=True)), self._params, **BAD_ROWS)
        if self._chat or any(prompt.conversation for prompt in prompts):
            assert self._model.path is not None  # it was loaded
            how = {"keep_bad": True, "must_work": 0, "every": self._chat}
            prompts = as_chat(prompts, self._model.path, self._model.tokenizer, **how)
        return dict(sorted(zip(numbers, prompts, strict=True)))

    def _identity(self, numbered: dict[int, Prompt]) -> dict[str, Any]:
        assert self._model.path is not None
        return jobs.fingerprint(list(numbered.values()), self._engine.plan, self._model.path) | {"numbers": list(numbered)}

    def _run(self, numbered: dict[int, Prompt], journal: Journal) -> None:
        todo = {number: prompt for number, prompt in numbered.items() if number not in journal.done}
        reasons = {n: prompt.error or refusal(self._model, n, prompt.model_input, prompt.params) for n, prompt in todo.items()}
        refused = [jobs.error_record(n, todo.pop(n), reason) for n, reason in reasons.items() if reason]
        if refused:
            journal.append(*refused)
        with JobWatch(self._engine, [prompt.params.max_new_tokens for prompt in todo.values()]) as watch:
            jobs.run_job(self._engine, todo, journal, watch)
