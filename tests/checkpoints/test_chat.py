"""Conversations under a checkpoint's own template, and the sampling it asks for."""

import json

import pytest
from small_checkpoint_files import RAW_CONFIG, train_tokenizer

from specmoe_jax.checkpoints.chat import chat_template, encode_chat, render_chat
from specmoe_jax.checkpoints.published.generation_config import sampling_defaults
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
        (
            {"repetition_penalty": 1.1, "min_p": 0.1, "suppress_tokens": [3, 5]},
            {"repetition_penalty": 1.1, "banned_tokens": (3, 5)},
        ),
        ({"do_sample": True, "min_p": 0.05, "presence_penalty": 1.5}, {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.5}),
    ],
)
def test_sampling_defaults(raw, expected, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("value", [-1, "hot", True, [0.5], 1e9])
@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "repetition_penalty", "suppress_tokens"])
def test_absurd_sampling_defaults_are_refused(name, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(CheckpointError, match=name):
        sampling_defaults(tmp_path)


WISHES = [
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
    ({"do_sample": True, "eta_cutoff": 0.05, "typical_p": 0.9}, "typical_p=0.9, eta_cutoff=0.05"),
    ({"do_sample": True, "diversity_penalty": 1.5, "temperature": 0.6}, "diversity_penalty=1.5"),
]


@pytest.mark.parametrize(("raw", "words"), WISHES, ids=[words for _, words in WISHES])
def test_wishes_that_are_not_built_are_told_in_one_warning(raw, words, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning) as caught:
        sampling_defaults(tmp_path)
    assert [str(w.message) for w in caught] == [f"generation_config.json asks for {words}, which is not built: it is ignored"]


@pytest.mark.parametrize(
    "raw", [{"repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": []}, {"min_p": 0.1}, {"do_sample": True, "min_p": None}]
)
def test_wishes_without_effect_are_not_told(raw, tmp_path, recwarn):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    sampling_defaults(tmp_path)
    assert not recwarn.list


def test_the_public_function(tmp_path):
    write_template(tmp_path)
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(backend=train_tokenizer(), eos_token_ids=(2,))
    assert chat_template(tmp_path, MESSAGES, tokenize=False) == RENDERED
    (tmp_path / "config.json").write_text(json.dumps(RAW_CONFIG))
    assert chat_template(str(tmp_path), MESSAGES) == encode_chat(tmp_path, tokenizer, MESSAGES)
    with pytest.raises(RequestError, match="messages is empty"):
        chat_template(tmp_path, [])
