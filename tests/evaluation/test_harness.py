"""lm-evaluation-harness through the adapter and through its own `hf` model, on the bundled model: equal scores, equal choices."""

import pathlib
import sys

import pytest

import specmoe_jax as sm
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.evaluation import harness_model, run_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")

TOLERANCE = 1e-4
# Of a whole text's sum, in nats. Two experts whose scores differ by less than float32 resolves may change
# places, which moves the token by a few thousandths; a token that is read wrongly moves it by tenths.
TEXT_TOLERANCE = 1e-2
MAX_LENGTH = 96  # so that texts take several windows
OPTIONS = {"log_samples": True, "bootstrap_iters": 0}
EXAMPLES = pathlib.Path(__file__).parents[2] / "docs/examples"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    sys.path.insert(0, str(EXAMPLES))
    try:
        from tasks import write_tasks
    finally:
        sys.path.remove(str(EXAMPLES))
    folder = tmp_path_factory.mktemp("tasks")
    patch = pytest.MonkeyPatch()
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_DATASETS_CACHE", str(folder / "cache"))):
        patch.setenv(name, value)
    yield write_tasks(folder, (checkpoint_path("demo") / "held_out.txt").read_text(encoding="utf-8"), count=5)
    patch.undo()


@pytest.fixture(scope="module")
def engine():
    model = sm.load_model("demo")
    return sm.Engine(model, sm.PRESETS["streaming"](model.config).replace(batch_size=8))


@pytest.fixture(scope="module")
def ours(engine, tasks):
    return run_tasks(harness_model(engine, max_length=MAX_LENGTH, progress="none"), tasks, **OPTIONS)


def test_every_metric_is_a_number(ours, tasks):
    assert set(ours["results"]) == {task["task"] for task in tasks}
    assert 0 <= ours["results"]["continue_choice"]["acc_norm,none"] <= 1


def test_scores_and_choices_are_those_of_the_hf_model(ours, tasks):
    for needed in ("torch", "transformers", "accelerate", "peft"):
        pytest.importorskip(needed, reason="the harness's own model is not installed: pip install '.[parity]'")
    from lm_eval.models.huggingface import HFLM

    folder = str(checkpoint_path("demo"))
    reference = HFLM(pretrained=folder, device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=4)
    theirs = run_tasks(reference, tasks, **OPTIONS)
    for task, metrics in ours["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][metric], rel=TOLERANCE), (task, metric)
    for task, samples in ours["samples"].items():
        tolerance = TEXT_TOLERANCE if task == "continue_perplexity" else TOLERANCE
        for own, other in zip(samples, theirs["samples"][task], strict=True):
            assert own["doc"] == other["doc"]
            assert_alike(own["resps"], other["resps"], tolerance)


def assert_alike(own, other, tolerance):
    """Texts and choices equal, log-likelihoods within the tolerance."""
    if isinstance(own, list | tuple):
        assert len(own) == len(other)
        for a, b in zip(own, other, strict=True):
            assert_alike(a, b, tolerance)
    elif isinstance(own, str) and not own.lstrip("-").replace(".", "").isdigit():
        assert own == other
    else:
        assert float(own) == pytest.approx(float(other), abs=tolerance)


def test_a_second_run_asks_nothing(engine, tasks, tmp_path):
    path = str(tmp_path / "answers.jsonl")
    results = []
    for _ in range(2):
        before = engine.stats()
        model = harness_model(engine, answers=path, max_length=MAX_LENGTH, progress="none")
        results.append(run_tasks(model, tasks, limit=2, **OPTIONS)["results"])
        model._answers.close()
        after = engine.stats()
    assert after["scored_tokens"] == before["scored_tokens"] and after["new_tokens"] == before["new_tokens"]
    assert results[0] == results[1]


def test_questions_go_through_the_chat_template(tasks, tmp_path):
    for file in checkpoint_path("demo").iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    model = sm.load_model(str(tmp_path))
    engine = sm.Engine(model, sm.PRESETS["streaming"](model.config).replace(batch_size=8))
    results = run_tasks(harness_model(engine, progress="none"), tasks[:1], apply_chat_template=True, limit=2, **OPTIONS)
    context = results["samples"]["continue_choice"][0]["arguments"][0][0]
    assert context.startswith("user: ") and context.endswith("\nassistant:")
