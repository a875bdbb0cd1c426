"""Chat templates and real tokenizers against transformers: rendered chats, ids of texts, decoded and streamed answers.

SPECMOE_TOKENIZERS names further folders with a tokenizer.json, separated by colons; real ones are too large to be kept here.
"""

import json
import os
import pathlib
import shutil

import pytest
from real_files import REAL
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from specmoe_jax.checkpoints.chat import render_chat
from specmoe_jax.checkpoints.tokenizer import load_tokenizer
from specmoe_jax.support.errors import UserError

transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed: pip install '.[parity]'")
pytest.importorskip("jinja2")

USER = "{{ '<u>' + messages[-1]['content'] + '</u>' }}"
CASES = {
    "plain": {"chat_template": "{{ bos_token }}" + USER + "{% if add_generation_prompt %}<a>{% endif %}"},
    "tools is not none": {
        "chat_template": "{% if tools is not none %}{% for t in tools %}{{ t|tojson }}{% endfor %}{% endif %}" + USER
    },
    "tools == none": {"chat_template": "{% if tools == none %}NO TOOLS{% endif %}" + USER},
    "documents is not none": {"chat_template": "{% if documents is not none %}DOCS{% endif %}" + USER},
    "generation": {
        "chat_template": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    },
    "generation with a variable": {"chat_template": "{% set x = 'y' %}{%- generation -%} {{ x }} {%- endgeneration -%}" + USER},
    "tokens of the older file": {"bos_token": None, "chat_template": "{{ bos_token }}" + USER, "map": {"bos_token": "<bos>"}},
    "older file beside added_tokens_decoder": {
        "bos_token": None, "added_tokens_decoder": {}, "chat_template": "{{ bos_token }}" + USER,
        "map": {"bos_token": {"content": "<bos>"}},
    },
    "AddedToken": {"bos_token": {"content": "<bos>", "__type": "AddedToken"}, "chat_template": "{{ bos_token }}" + USER},
    "named": {"chat_template": [{"name": "tool_use", "template": "T{{ tools }}"}, {"name": "default", "template": "D" + USER}]},
    "without default": {"chat_template": [{"name": "rag", "template": "RAG"}]},
    "a token of its own": {"image_token": "<img>", "chat_template": "{{ image_token }}" + USER},
    "extra tokens": {"extra_special_tokens": {"image_token": "<img>"}, "chat_template": "{{ image_token }}" + USER},
    "a list of tokens": {"additional_special_tokens": ["<img>"], "chat_template": "{{ additional_special_tokens }}" + USER},
    "sep and cls": {"sep_token": "<sep>", "cls_token": "<pad>", "chat_template": "{{ sep_token }}{{ cls_token }}" + USER},
    "tojson": {"chat_template": "{{ messages|tojson(indent=2) }}{{ {'b': '<é>'}|tojson }}{{ 'é'|tojson(ensure_ascii=True) }}"},
    "tojson in ascii": {"chat_template": "{{ messages|tojson(ensure_ascii=False, sort_keys=True) }}"},
    "options": {"chat_template": "{% if enable_thinking is defined and enable_thinking is false %}NT{% endif %}" + USER},
    "reasoning": {"chat_template": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"},
    "null content": {"chat_template": "{% for m in messages %}{{ 'content' in m }}{% endfor %}"},
    "break": {"chat_template": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"},
    "refuses": {"chat_template": "{{ raise_exception('no') }}"},
    "blank": {"chat_template": "  {%- if true %}\r\n  {{ 'x' }}\r\n  {% endif %}\n\n" + USER + "\n"},
    "namespace": {
        "chat_template": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}"
    },
}  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "é <b>", "parameters": CITY}}
TALKS = {
    "one": [{"role": "user", "content": " Hi é <&> "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
    ],
}
OPTIONS = [
    {}, {"add_generation_prompt": False}, {"tools": [WEATHER]}, {"enable_thinking": False}, {"reasoning_effort": "high"},
]  # fmt: skip
TEXTS = [
    "Call me Ishmael.", "  def f(x):\n\treturn  x\n", "日本語のテキスト 한국어", "\U0001f600\U0001f3f3\ufe0f naïve café",
    " leading", "<|im_end|></s><s>[INST] x", "a\u00a0b\r\n",
]  # fmt: skip


def folder_of(case: dict, path: pathlib.Path) -> pathlib.Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<img>", "<sep>", "<pad>"])
    backend.save(str(path / "tokenizer.json"))
    case = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"} | case
    if "map" in case:
        (path / "special_tokens_map.json").write_text(json.dumps(case.pop("map")))
    (path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in case.items() if value is not None}))
    return path


def assert_same(path: pathlib.Path, theirs, messages: list[dict], options: dict) -> None:
    given = {"add_generation_prompt": True} | options
    try:
        wanted = theirs.apply_chat_template(messages, tokenize=False, **given)
    except Exception:  # whatever it refuses is refused here too
        with pytest.raises(UserError):
            render_chat(path, messages, **given)
        return
    assert render_chat(path, messages, **given) == wanted


@pytest.mark.parametrize("name", CASES)
def test_templates_of_every_kind(name, tmp_path):
    path = folder_of(dict(CASES[name]), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for messages in (*TALKS.values(), [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]):
        for options in OPTIONS:
            assert_same(path, theirs, messages, options)


def real_templates() -> list[pathlib.Path]:
    return [folder for folder in REAL.glob("*") if (folder / "tokenizer_config.json").exists()] if REAL else []


def real_tokenizers() -> list[pathlib.Path]:
    named = [pathlib.Path(name) for name in os.environ.get("SPECMOE_TOKENIZERS", "").split(":") if name]
    files = [folder / "tokenizer.json" for folder in (*real_templates(), *named)]
    return [file.parent for file in files if file.exists() and file.stat().st_size > 1000]  # some are pointers to large files


def name_of(folder: pathlib.Path) -> str:
    return folder.parts[-3] if "package" in folder.parts else folder.name


@pytest.mark.parametrize("folder", real_templates(), ids=lambda folder: folder.name)
def test_real_templates(folder, tmp_path):
    """Those whose vocabulary is not there get one of bytes: the text does not depend on it."""
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    if (folder / "chat_template.jinja").exists():
        shutil.copyfile(folder / "chat_template.jinja", tmp_path / "chat_template.jinja")
    elif not raw.get("chat_template"):
        pytest.skip("it has no chat template")
    kept = {key: value for key, value in raw.items() if key.endswith("_token") or key == "chat_template"}
    path = folder_of(kept, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for messages in TALKS.values():
        for options in OPTIONS:
            assert_same(path, theirs, messages, options)


@pytest.mark.parametrize("folder", real_tokenizers(), ids=name_of)
def test_real_tokenizers(folder):
    """Ids, rendered chats, decoded texts; what is streamed is what is decoded."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, ())
    skip = {"skip_special_tokens": not ours.shows_special, "clean_up_tokenization_spaces": False}
    # Of DeepSeek's older class name release 5 makes a tokenizer that forgets add_bos_token; the releases of its time added BOS.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    forgets = settings.get("add_bos_token") and theirs("a")["input_ids"][0] != ours.encode("a")[0]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids[bool(forgets) :] == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, **skip)
        for prompt in ((), ids[:-1], ids[: len(ids) // 2]):
            stream, new = ours.stream(prompt), ids[len(prompt) :]
            streamed = "".join([*(stream.push(i) for i in new), stream.finish()])
            assert streamed == ours.decode(ids)[len(ours.decode(ids[: len(prompt)])) :] or "\ufffd" in ours.decode(prompt)
    if theirs.chat_template:
        for messages in TALKS.values():
            for options in OPTIONS:
                assert_same(folder, theirs, messages, options)
