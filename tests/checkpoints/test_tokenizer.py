"""Text in, text out, and never half a character on the way."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint_files import train_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from specmoe_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer, text_after

BYTE_LEVEL = Tokenizer(backend=train_tokenizer(), eos_token_ids=(2,))


def sentencepiece_like() -> Tokenizer:
    """Metaspace with byte fallback and a leading space that decoding strips, as Mixtral's own tokenizer has."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdehilnorstuw", "▁he", "▁the", "llo"]:
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend=backend, eos_token_ids=(2,))


SENTENCEPIECE = sentencepiece_like()


def pieces(tokenizer, ids):
    stream = tokenizer.stream()
    return [stream.push(i) for i in ids] + [stream.finish()]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "byte fallback"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_stream_joins_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "byte fallback"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stream_survives_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    assert all(isinstance(piece, str) for piece in pieces(tokenizer, ids))


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=30))
def test_byte_level_stream_of_any_ids_is_the_decoding(ids):
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_a_token_without_text_does_not_make_the_next_one_the_first():
    """The leading space of the first token is dropped; a special token in between must not drop another."""
    the, he = (SENTENCEPIECE.backend.token_to_id(piece) for piece in ("▁the", "▁he"))
    for ids in ([the, 2, he], [2, the, he], [the, 2, 2, 1, he, 2, he]):
        assert "".join(pieces(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


def test_half_a_character_waits():
    ids = BYTE_LEVEL.encode("é日")
    assert len(ids) > 2
    assert [piece for piece in pieces(BYTE_LEVEL, ids) if piece] == ["é", "日"]


def test_an_unfinished_character_ends_as_a_replacement():
    assert "".join(pieces(BYTE_LEVEL, BYTE_LEVEL.encode("x日")[:-1])) == "x\ufffd"


def test_endless_replacement_characters_are_not_held_forever():
    stream = BYTE_LEVEL.stream()
    first = BYTE_LEVEL.encode("日")[0]
    emitted = "".join(stream.push(first) for _ in range(200))
    assert len(emitted) > 100


def test_ids_beyond_the_tokenizer_decode_to_nothing():
    ids = BYTE_LEVEL.encode("times")
    assert BYTE_LEVEL.decode([*ids, BYTE_LEVEL.vocab_size, 10**6, -1, 1 << 40]) == "times"


def test_bos_is_added_only_by_the_post_processor():
    backend = train_tokenizer()
    plain = Tokenizer(backend=backend, eos_token_ids=()).encode("it was")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert Tokenizer(backend=backend, eos_token_ids=()).encode("it was") == [1, *plain]


def test_limits_of_the_training_run_are_dropped(tmp_path):
    backend = train_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, (2,))
    assert tokenizer.encode("It was the best of times") == BYTE_LEVEL.encode("It was the best of times")


def test_eos_of_the_tokenizer_config_when_no_other_is_known(tmp_path):
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, ()).eos_token_ids == ()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path, ()).eos_token_ids == (2,)
    assert load_tokenizer(tmp_path, (7,)).eos_token_ids == (7, 2)  # as generation_config.json and a chat's own end together
    assert load_tokenizer(tmp_path, (2, 7)).eos_token_ids == (2, 7)


ENDS = [  # add_bos_token, add_eos_token, what tokenizer.json adds itself -> ids before and after a text
    ({"add_bos_token": True}, None, ([1], [])),
    ({"add_bos_token": True, "add_eos_token": True}, None, ([1], [2])),
    ({"add_bos_token": False}, "<s> $A", ([], [])),
    ({"add_eos_token": True}, "<s> $A", ([1], [2])),
    ({}, "<s> $A", ([1], [])),
    ({"add_bos_token": True}, "<s> $A", ([1], [])),
    ({"add_bos_token": True, "bos_token": None}, None, ([], [])),
]


@pytest.mark.parametrize(("settings", "own", "ends"), ENDS, ids=str)
def test_bos_and_eos_as_the_tokenizers_config_says(settings, own, ends, tmp_path):
    backend = train_tokenizer()
    if own:
        backend.post_processor = processors.TemplateProcessing(single=own, special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    before, after = ends
    assert load_tokenizer(tmp_path, ()).encode("it was") == [*before, *BYTE_LEVEL.encode("it was"), *after]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), cut=st.integers(0, 30))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "byte fallback"])
def test_a_stream_after_a_prompt_is_the_rest_of_the_text(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    prompt, new = ids[:cut], ids[cut:]
    stream = tokenizer.stream(prompt)
    streamed = "".join([*(stream.push(i) for i in new), stream.finish()])
    if "\ufffd" not in tokenizer.decode(prompt) and "\ufffd" not in text:
        assert tokenizer.decode(prompt) + streamed == tokenizer.decode(ids)
        assert text_after(tokenizer, prompt, new) == streamed
