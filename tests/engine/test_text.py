"""The text of an answer: what it goes on from, and the special tokens that end it."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

import specmoe_jax as sm
from specmoe_jax.checkpoints.tokenizer import Tokenizer, text_after
from specmoe_jax.engine.requests.finish import final_text
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.models.model import random_model
from specmoe_jax.testing import TINY, byte_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁Call", "▁me", "al", "me"]
WORDS += [f"▁w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(TINY.vocab_size - len(WORDS))]
IDS = {word: i for i, word in enumerate(WORDS)}


def sentencepiece() -> Tokenizer:
    """As Mixtral's tokenizer.json: spaces are ▁, one is put before a text and stripped from it again."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=IDS, merges=[], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend=backend, eos_token_ids=(2,))


TOKENIZER = sentencepiece()
MODEL = random_model(dataclasses.replace(TINY, eos_token_ids=(2,)), seed=0, tokenizer=TOKENIZER)
PARAMS = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("preset", ["resident", "specmoe"])
@pytest.mark.parametrize("prompt", ["call me", "x", "a b c d e f g h i j k l m n"])
def test_an_answer_goes_on_from_its_prompt(prompt, preset):
    """Offline and streamed: prompt + text is what all ids decode to, the first space of the answer included."""
    plan = sm.PRESETS[preset](MODEL.config).replace(batch_size=1)
    engine = sm.Engine(MODEL, plan)
    shown, pieces = IncrementalText(MODEL, (), prompt), []
    for event in engine.stream([prompt], PARAMS):
        pieces.append(shown.push(event))
        done = event.completion
    whole = TOKENIZER.decode([*TOKENIZER.encode(prompt), *done.token_ids])
    assert prompt + done.text == whole and "".join(pieces) == done.text
    assert done.text.startswith(" "), "the random model begins with a word"


def test_indentation_is_kept():
    body = (*[IDS["▁"]] * 4, *(IDS[letter] for letter in "return"))
    prompt = tuple(TOKENIZER.encode("def f"))
    assert final_text((*body, 2), (), (2,), TOKENIZER, prompt) == "    return"
    assert text_after(TOKENIZER, (), body) == "   return"  # the beginning of a text has no space that was put there


def test_a_stop_string_of_the_first_word():
    (done,) = sm.Engine(MODEL, sm.PRESETS["resident"](MODEL.config)).generate(["call me"], PARAMS)
    stop = done.text[:3]
    assert stop.startswith(" ")
    params = dataclasses.replace(PARAMS, stop=(stop,))
    (cut,) = sm.Engine(MODEL, sm.PRESETS["resident"](MODEL.config)).generate(["call me"], params)
    assert (cut.text, cut.finish_reason, len(cut.token_ids)) == ("", "stop", 1)


@pytest.fixture
def spoken():
    """A model, what it says, and a tokenizer of which its third token is a special one."""
    tokenizer = byte_tokenizer()
    model = random_model(dataclasses.replace(TINY, eos_token_ids=()), seed=0, tokenizer=tokenizer)
    said = sm.Engine(model, sm.PRESETS["resident"](model.config)).generate(["a"], sm.SamplingParams(max_new_tokens=6))[0].token_ids
    letter = tokenizer.backend.id_to_token(said[2])
    tokenizer.backend.add_special_tokens([letter])
    return model, said, letter


@pytest.mark.parametrize("preset", ["resident", "specmoe"])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_string_that_is_a_special_token(spoken, preset, ignore_eos):
    model, said, letter = spoken
    plan = sm.PRESETS[preset](model.config).replace(batch_size=1)
    params = sm.SamplingParams(max_new_tokens=6, stop=("never", letter), ignore_eos=ignore_eos)
    (done,) = sm.Engine(model, plan).generate(["a"], params)
    end = said.index(said[2]) + 1
    assert (done.token_ids, done.finish_reason) == (said[:end], "stop")
    assert done.text == model.tokenizer.decode(said[: end - 1])


def test_a_special_token_beside_other_text_is_refused(spoken):
    model, _, letter = spoken
    engine = sm.Engine(model, sm.PRESETS["resident"](model.config))
    with pytest.raises(sm.RequestError, match=r"beside other text; give .* alone"):
        engine.generate(["a"], sm.SamplingParams(stop=(f"{letter}\n",)))


def test_channels_show_their_tokens():
    """gpt-oss: the special tokens that keep analysis and answer apart stay in the text."""
    tokenizer = byte_tokenizer()
    assert not tokenizer.shows_special
    other = byte_tokenizer()
    other.backend.add_special_tokens(["<|channel|>", "<|message|>"])
    harmony = Tokenizer(backend=other.backend, eos_token_ids=())
    ids = harmony.encode("<|channel|>final<|message|>Yes.")
    assert harmony.decode(ids) == "<|channel|>final<|message|>Yes."
    assert harmony.decode(ids, skip_special_tokens=True) == "finalYes."
