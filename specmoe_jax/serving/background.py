"""A batch job behind the requests of people: it takes the rows that they leave, and its journal is that of `specmoe generate`."""

import dataclasses
import logging
import queue
import threading

from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.serving.runner import Runner
from specmoe_jax.support.errors import RequestError

_LOG = logging.getLogger(__name__)


class BackgroundJob:
    """Feeds prompts to a running server and writes what is finished. done, failed, total: requests so far."""

    def __init__(self, engine: Engine, runner: Runner, prompts: list[Prompt], output: str, *, restart: bool):
        assert engine.model.path is not None  # it was loaded
        reasons = jobs.refusals(engine.model, prompts)
        job = jobs.fingerprint(prompts, engine.plan, engine.model.path, engine.model.adapter)
        self._journal = Journal(output, job, restart=restart, requests=len(prompts))
        self._todo = jobs.record_errors(prompts, reasons, self._journal)
        self._runner, self._ended, self._stopping = runner, queue.SimpleQueue(), False
        self.total, self.failed, self.done = len(prompts), sum(map(bool, reasons)), len(prompts) - len(self._todo)
        self._thread = threading.Thread(target=self._run, name="specmoe-background", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Before the runner stops: what has not ended is done by the next run of the job."""
        self._stopping = True
        self._ended.put(None)
        self._thread.join()
        self._journal.close()

    def _run(self) -> None:
        try:
            self._feed()
        except RequestError as e:  # the disk does not take the records; the server goes on
            _LOG.error("the background job ends: %s", e)

    def _feed(self) -> None:
        """As many at a time as there are rows, so that a queue of millions is not in memory twice."""
        left, inside = iter(self._todo.items()), 0
        while not self._stopping:
            while inside < self._runner.service.rows and (following := next(left, None)) is not None:
                inside += self._submit(*following)
            if not inside:
                _LOG.info("the background job is done: %d requests, %d of them failed", self.total, self.failed)
                return
            if (ended := self._ended.get()) is None:
                return
            number, completion = ended
            inside -= 1
            if completion.finish_reason != "cancelled":
                self._record(number, completion)

    def _submit(self, number: int, prompt: Prompt) -> bool:
        """Whether it was taken; one that is too long for the server's rows gets a record that says so."""

        def on_event(event: TokenEvent) -> None:
            if event.completion is not None:
                self._ended.put((number, event.completion))

        try:
            how = {"sampling_id": number, "background": True, "on_event": on_event}
            self._runner.service.submit(prompt.model_input, prompt.params, **how)
        except RequestError as e:
            self.failed, self.done = self.failed + 1, self.done + 1
            self._journal.append(jobs.error_record(number, prompt, str(e)))
            return False
        self._runner.wake()
        return True

    def _record(self, number: int, completion: Completion) -> None:
        prompt = self._todo[number]
        self._journal.append(jobs.record(number, prompt, dataclasses.replace(completion, id=number, prompt=prompt.text)))
        self.done += 1
        self.failed += completion.finish_reason == "error"
