"""The tiny model as a checkpoint on disk, and the scripts run in this process and in one of their own."""

import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import types
from typing import NamedTuple

import absl.flags
import pytest
import safetensors.numpy
from absl.testing import flagsaver

from specmoe_jax.models.families import family_of
from specmoe_jax.models.spec import random_tensor, spec_leaves
from specmoe_jax.testing import TINY, byte_tokenizer

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": TINY.vocab_size,
    "hidden_size": TINY.hidden_size,
    "intermediate_size": TINY.expert_hidden,
    "num_hidden_layers": TINY.num_layers,
    "num_attention_heads": TINY.num_heads,
    "num_key_value_heads": TINY.num_kv_heads,
    "head_dim": TINY.head_dim,
    "num_local_experts": TINY.num_experts,
    "num_experts_per_tok": TINY.experts_per_token,
    "max_position_embeddings": TINY.max_positions,
    "rope_theta": TINY.rope_theta,
    "rms_norm_eps": TINY.norm_eps,
    "eos_token_id": list(TINY.eos_token_ids),
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The weights of testing.tiny() in Hugging Face format. Never written to."""
    path = tmp_path_factory.mktemp("tiny")
    family = family_of(TINY)
    specs = spec_leaves(family.weight_specs(TINY))
    for layer in range(TINY.num_layers):
        for expert in range(TINY.num_experts):
            specs += family.expert_specs(TINY, layer, expert)
    safetensors.numpy.save_file({spec.name: random_tensor(spec, 0) for spec in specs}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def generate_script():
    """scripts/generate.py as a module, with flags of its own: other scripts define some of the same names."""
    own = absl.flags.FlagValues()
    define = {name: functools.partial(f, flag_values=own) for name, f in vars(absl.flags).items() if name.startswith("DEFINE_")}
    stand_in = types.SimpleNamespace(**{**vars(absl.flags), **define, "FLAGS": own})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.setattr(absl, "flags", stand_in)
        return importlib.import_module("generate")


@pytest.fixture
def generate(generate_script, capfd, monkeypatch, tmp_path):
    """Runs the script in this process, in an empty folder: arguments -> code, stdout, stderr."""
    common, own = generate_script._common, generate_script.flags.FLAGS
    monkeypatch.setattr(common, "flags", generate_script.flags)
    monkeypatch.setattr(common, "use_compile_cache", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*args) -> Ran:
        code, saved = 0, flagsaver.save_flag_values(own)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        own.unparse_flags()
        try:
            common._parse(["generate.py", *map(str, args)])
            common._guarded(generate_script.main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            flagsaver.restore_flag_values(saved, own)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Runs a script as a person does, in a process of its own; compiled programs are kept between runs."""
    cache = tmp_path_factory.mktemp("cache")

    def run(name, *args) -> Ran:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / name), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
