"""Conversations under a checkpoint's own template, and the sampling it asks for."""

import json

import pytest
from small_checkpoint_files import train_tokenizer

from specmoe_jax.checkpoints.chat import encode_chat, render_chat, sampling_defaults
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.support.errors import CheckpointError, RequestError

TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant') }}{% endif %}
{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}
{% endfor %}"""
MESSAGES = [{"role": "user", "content": " best "}, {"role": "assistant", "content": "worst"}, {"role": "user", "content": "it"}]
RENDERED = "<s>[INST] best [/INST]worst</s>[INST] it [/INST]"


def write_template(path, template=TEMPLATE, **others):
    raw = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}} | others
    (path / "tokenizer_config.json").write_text(json.dumps(raw))


@pytest.fixture(autouse=True)
def jinja():
    pytest.importorskip("jinja2")


def test_template_is_rendered(tmp_path):
    write_template(tmp_path)
    assert render_chat(tmp_path, MESSAGES) == RENDERED


def test_template_of_its_own_file_and_of_a_list(tmp_path):
    write_template(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}])
    assert render_chat(tmp_path, MESSAGES) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render_chat(tmp_path, MESSAGES) == "file"


def test_special_tokens_become_single_ids(tmp_path):
    write_template(tmp_path)
    ids = encode_chat(tmp_path, Tokenizer(backend=train_tokenizer(), eos_token_ids=(2,)), MESSAGES)
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1


def test_refusals_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no chat template"):
        render_chat(tmp_path, MESSAGES)
    write_template(tmp_path)
    with pytest.raises(RequestError, match="only user and assistant"):
        render_chat(tmp_path, [{"role": "system", "content": "x"}])
    for template in ("{% for %}", "{{ ().__class__.__bases__[0].__subclasses__() }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}"):
        write_template(tmp_path, template)
        with pytest.raises(CheckpointError, match="chat template fails") as caught:
            render_chat(tmp_path, MESSAGES)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        ({"do_sample": True, "temperature": 0, "top_k": 5}, {}),
    ],
)
def test_sampling_defaults(raw, expected, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("value", [-1, "hot", True, [], 2.5])
@pytest.mark.parametrize("name", ["top_p", "top_k"])
def test_absurd_sampling_defaults_are_refused(name, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(CheckpointError, match=name):
        sampling_defaults(tmp_path)
