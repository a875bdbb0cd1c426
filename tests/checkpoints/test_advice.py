"""A directory in another form is told what to do with it, before anything else is complained about."""

import pytest
from small_checkpoint_files import write_checkpoint

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.published.advice import VOCABULARIES
from specmoe_jax.jobs.job import read_head
from specmoe_jax.support.errors import CheckpointError, RequestError


def emptied(path, *files):
    """A checkpoint without weights, with the given files instead, and a config that would be refused as well."""
    write_checkpoint(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text("{}")
    for name in files:
        (path / name).write_bytes(b"")
    return path


FORMS = [
    (("pytorch_model.bin",), "specmoe convert --model="),
    (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "specmoe convert --model="),
    (("consolidated.00.pth",), "consolidated.00.pth is torch's format under a name of its own"),
    (("model-00001-of-00002.safetensors",), "neither model.safetensors nor model.safetensors.index.json: is the download complete"),
]


@pytest.mark.parametrize(("files", "words"), FORMS, ids=[files[0] for files, _ in FORMS])
def test_the_form_is_told_first(files, words, tmp_path):
    path = emptied(tmp_path / "model", *files)
    for read in (lambda: load_model(str(path)), lambda: read_head(path)):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert words in str(caught.value) and str(caught.value).isprintable()


def test_a_conversion_says_so_too(tmp_path):
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        convert(str(emptied(tmp_path / "model", "consolidated.00.pth")), tmp_path / "new", to="specmoe")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_tokenizer_of_another_form(vocabulary, tmp_path):
    """A job, whose prompts are texts, is refused at once; token ids need none."""
    path = write_checkpoint(tmp_path / "model")
    (path / "tokenizer.json").rename(path / vocabulary)
    advice = f"has {vocabulary} but no tokenizer.json; make it once: pip install transformers"
    with pytest.raises(CheckpointError) as caught:
        read_head(path)
    assert advice in str(caught.value)
    model = load_model(str(path))
    engine = Engine(model, PRESETS["resident"](model.config))
    with pytest.raises(RequestError) as caught:
        engine.generate(["text"], SamplingParams(max_new_tokens=1))
    assert advice in str(caught.value)
