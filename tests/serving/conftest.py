"""One server for the tests of this folder."""

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("jinja2")

import specmoe_jax as sm


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    from served import write_chat_model

    return sm.load_model(str(write_chat_model(tmp_path_factory.mktemp("chat"))))


@pytest.fixture(scope="module")
def engine(chat_model):
    plan = sm.PRESETS["specmoe"](chat_model.config)
    return sm.Engine(chat_model, plan.replace(batch_size=3, draft_experts=2, draft_length=2, deterministic_sampling=True))


@pytest.fixture(scope="module")
def served(engine):
    from served import serving

    with serving(engine, max_body_bytes=20_000, most_answers=4) as found:
        yield found


@pytest.fixture(scope="module")
def offline(chat_model):
    """Completions of the resident engine: (prompts, params) -> those of `generate`."""
    plan = sm.PRESETS["resident"](chat_model.config).replace(deterministic_sampling=True)
    return sm.Engine(chat_model, plan).generate
