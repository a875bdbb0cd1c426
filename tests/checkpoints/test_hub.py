"""Names of repositories: found in the local cache without a network, else downloaded, else told in one line."""

import json
import os
import sys
import types

import pytest
from small_checkpoint_files import RAW_CONFIG, write_checkpoint

from specmoe_jax.checkpoints import load_config, load_model
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.checkpoints.published import hub
from specmoe_jax.support.errors import CheckpointError

NAME, COMMIT = "org/tiny-moe_1.0", "0123abcd"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No cache of the machine's user, no huggingface_hub."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def fill_cache(cache, commit=COMMIT, *, ref=True):
    """As huggingface_hub lays a repository out: blobs, and a snapshot of symlinks to them."""
    folder = cache / "models--org--tiny-moe_1.0"
    blobs, snapshot = write_checkpoint(folder / "blobs"), folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        os.symlink(file, snapshot / file.name)
    if ref:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_cached_name_loads_without_network(variable, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    below = {"HF_HOME": "hub", "HF_HUB_CACHE": "", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    if variable in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(folder))
    snapshot = fill_cache(folder / below[variable])
    assert checkpoint_path(NAME) == snapshot
    assert load_model(NAME).path == snapshot


def test_the_only_snapshot_is_taken_where_no_branch_is_named(tmp_path):
    snapshot = fill_cache(tmp_path / "home" / "hub", ref=False)
    assert checkpoint_path(NAME) == snapshot
    (snapshot.parent / "another").mkdir()
    with pytest.raises(CheckpointError, match=NAME):
        checkpoint_path(NAME)


def test_a_directory_of_that_name_comes_first(monkeypatch, tmp_path):
    fill_cache(tmp_path / "home" / "hub")
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not checkpoint_path(NAME).is_absolute()


def test_without_the_library_it_is_named():
    with pytest.raises(CheckpointError, match=r"not in .*home/hub; pip install specmoe_jax\[hub\]"):
        load_model(NAME)


@pytest.mark.parametrize("text", ["no/such/model", "../x", "org/", "/x/y", "model", "a b/c"])
def test_other_texts_are_no_names(text):
    with pytest.raises(CheckpointError, match="no such directory; give demo"):
        load_model(text)


def fake_hub(monkeypatch, folder, error=None):
    """Stands for huggingface_hub; keeps what it was asked for."""
    asked = {}
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "metal/model.safetensors"]

    class HfApi:
        def model_info(self, name):
            if error is not None:
                raise error
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(write_checkpoint(folder))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download))
    return asked


def test_a_download_takes_the_weights_once(monkeypatch, tmp_path):
    asked = fake_hub(monkeypatch, tmp_path / "downloaded")
    assert checkpoint_path(NAME) == tmp_path / "downloaded"
    assert "model.safetensors" in asked[NAME] and not {"pytorch_model.bin", "metal/model.safetensors"} & set(asked[NAME])


def test_weights_of_torch_where_there_are_no_others():
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin", "config.json"]
    assert hub.weight_files(files) == files[:2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ConnectError", "no network reaches huggingface.co; where there is one: hf download org/tiny-moe_1.0"),
        ("LocalEntryNotFoundError", "no network reaches huggingface.co"),
        ("GatedRepoError", "its licence has to be accepted at https://huggingface.co/org/tiny-moe_1.0"),
        ("RepositoryNotFoundError", "there is no such repository"),
        ("OSError", "the same command goes on where it stopped"),
    ],
)
def test_what_goes_wrong_is_one_line(kind, words, monkeypatch, tmp_path):
    fake_hub(monkeypatch, tmp_path, error=type(kind, (OSError,), {})("a\nlong story"))
    with pytest.raises(CheckpointError) as caught:
        load_model(NAME)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_offline_means_offline(monkeypatch, tmp_path):
    fake_hub(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids a download"):
        load_model(NAME)


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN"])
def test_configs_may_hold_what_python_writes(number, tmp_path):
    """json.dumps writes these, json.loads and transformers read them; a number that is used must be finite all the same."""
    write_checkpoint(tmp_path)
    text = json.dumps(RAW_CONFIG)[:-1]
    (tmp_path / "config.json").write_text(f'{text}, "time_step_limit": [0.0, {number}]}}')
    assert load_config(tmp_path).num_layers == 2
    (tmp_path / "config.json").write_text(f'{text}, "rms_norm_eps": {number}}}')
    with pytest.raises(CheckpointError, match=r"rms_norm_eps is .*; it must be a finite number"):
        load_config(tmp_path)
