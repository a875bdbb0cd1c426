"""scripts/explain.py on headers alone: quick, with the memory that the engine itself accounts for, and refusals that help."""

import json
import re
import shlex
import types

import numpy as np
import pytest

from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.published.quantisation import as_stored
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests import prepare as requests
from specmoe_jax.engine.requests.prepare import check_job
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.planner.machines import machine
from specmoe_jax.support.units import GIB
from tests.planner.synthetic_headers import CONFIGS, write_headers

PROMPT, NEW = 512, 128


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    return {name: write_headers(folder / name, raw) for name, raw in CONFIGS.items()}


def shown(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("preset", ["specmoe", "streaming"])
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_the_engines_own_account(explain, headers, name, preset, monkeypatch):
    """The engine's account of such a job, from requests of these lengths; no weight is read: there is none behind the headers."""
    config = as_stored(headers[name], load_config(headers[name]))
    if preset == "streaming" and config.encoder is not None:
        pytest.skip("expert_flow=stream is for decoders alone")
    found = shown(
        explain(f"--model={headers[name]}", "--hardware=h200", f"--preset={preset}", "--batch_size=8", "--skew=0.3", "--json")
    )
    plan = PRESETS[preset](config).replace(dtype="bfloat16", batch_size=8).resolved(accelerator_is_cpu=False)
    model = types.SimpleNamespace(config=config, tokenizer=None)
    monkeypatch.setattr(requests, "accelerator_is_cpu", lambda: False)  # as on a machine with an H200
    own = check_job(model, plan, [(5,) * PROMPT] * 8, SamplingParams(max_new_tokens=NEW))
    assert found["accelerator_gib"]["all"] == pytest.approx(own.accelerator_bytes / GIB, rel=0.02)
    assert found["host_gib"]["all"] == pytest.approx(own.host_bytes / GIB, rel=0.02)
    assert found["host_gib"]["experts, pinned"] == pytest.approx(own.host_expert_bytes / GIB)
    low, high = found["tokens_per_s_interval"]
    assert low < found["tokens_per_s"] < high and found["largest_batch"] >= 8 and found["load_s"] > 0


def test_stored_bytes_are_those_of_the_files(explain, headers):
    """Experts in MXFP4 take in memory what they take on disk."""
    found = shown(explain(f"--model={headers['gpt_oss_120b']}", "--hardware=h200", "--json"))
    assert found["disk_gib"] == pytest.approx((headers["gpt_oss_120b"] / "model.safetensors").stat().st_size / GIB, rel=1e-3)
    config = load_config(headers["gpt_oss_120b"])
    others = sum(spec.bytes("bfloat16") for spec in spec_leaves(family_of(config).weight_specs(config))) / GIB
    assert found["host_gib"]["experts, pinned"] == pytest.approx(found["disk_gib"] - others, rel=0.02)


REFUSED = {
    "device memory": ("mixtral_8x7b", "--hardware=l4 --preset=specmoe --batch_size=4096 --host_memory_gib=200"),
    "device memory of 15": ("mixtral_8x7b", "--hardware=t4 --preset=resident --host_memory_gib=200"),
    "host memory of 48": ("mixtral_8x7b", "--hardware=tpu_v5e --preset=on_demand"),
    "host memory holds": ("mixtral_8x7b", "--hardware=a30 --preset=streaming --batch_size=4000"),
    "2 layers' experts": ("gpt_oss_120b", "--hardware=l4 --preset=streaming --host_memory_gib=300 --device_memory_gib=6"),
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_refusal_names_resource_shortage_and_a_plan_that_works(explain, headers, says):
    name, arguments = REFUSED[says]
    given = [f"--model={headers[name]}", *arguments.split()]
    ran = explain(*given)
    assert ran.code == 1 and says in ran.err and ran.err.count("\n") == 1
    assert re.search(r"[GM]iB (short|more)", ran.err)
    flags = shlex.split(ran.err.split("the nearest that fits ")[1].split(": ", 1)[1])
    assert explain(*given, *flags).code == 0


def test_where_nothing_fits_it_says_what_would(explain, headers):
    ran = explain(f"--model={headers['mixtral_8x7b']}", "--hardware=a30", "--device_memory_gib=1")
    assert ran.code == 1 and "no plan near this one fits A30" in ran.err and "GiB there" in ran.err


def test_the_twin_shows_presets_and_policies(explain, headers, tmp_path):
    trace = np.random.default_rng(0).integers(0, 3, (20, 4, 8))
    np.save(tmp_path / "trace.npy", trace)
    found = shown(
        explain(
            f"--model={headers['mixtral_8x7b']}", "--hardware=h100", "--simulate", "--json", f"--trace={tmp_path / 'trace.npy'}",
            "--cache_experts=8", "--acceptance=eagle_mixtral", "--draft_length=5",
        )
    )  # fmt: skip
    assert set(found["presets"]) == set(PRESETS) - {"overlap"}
    assert {row["batch"] for row in found["presets"].values()} == {16}
    assert found["presets"]["specmoe"]["bytes x on_demand"] < 1
    cache = found["cache"]
    assert cache["experts_needed"] == (trace > 0).sum()
    table = explain("--model=demo", "--hardware=h100", "--simulate", "--batch_size=8").out.splitlines()
    assert any("tok/s" in line and "bound by" in line for line in table)
    assert max(map(len, table)) <= 80 and any(re.match("specmoe +8 ", line) for line in table)
    assert not any("specmoeoff" in line for line in table)  # it needs a head that nobody has
    assert any("acceptance of draft=self: 0.6 a token, ASSUMED" in line for line in table)
    assert all(cache["fetched, belady"] <= cache[f"fetched, {name}"] for name in ("lru", "frequency", "hot_temporal"))


@pytest.mark.slow
def test_a_config_alone_is_enough(explain, headers, tmp_path):
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "config.json").write_text((headers["qwen3_30b_a3b"] / "config.json").read_text())
    (tmp_path / "mine.json").write_text(machine("l4").replace(name="mine", host_memory_bytes=2e11).to_json())
    ran = explain(f"--model={tmp_path / 'spec'}", f"--hardware={tmp_path / 'mine.json'}")
    assert ran.code == 0, ran.err
    assert "binding_resource" in ran.out and "mine" in ran.out and "disk_gib" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_without_a_machine_it_is_this_one(explain, explain_script, monkeypatch):
    mine = machine("l4").replace(name="mine", measured=True)
    monkeypatch.setattr("specmoe_jax.cli.flag_groups.machine_flag.probe", lambda **_: mine)
    found = shown(explain("--model=demo", "--json"))
    assert found["machine"] == "mine" and not any("data sheets" in said for said in found["assumptions"])


def test_without_a_preset_it_recommends(explain, headers):
    """On a machine that is given other memory than its own; the host's cores compute a part of what is absent."""
    asked = (f"--model={headers['qwen3_30b_a3b']}", "--hardware=4090d", "--host_memory_gib=100", "--requests=1")
    found = shown(explain(*asked, "--json"))
    (plans,) = found["advice"].values()
    assert found["host_gib"]["has"] == 100 and plans["best"]["exact"] and 25 < plans["best"]["tokens_per_s"] < 60
    assert "--host_share=" in plans["best"]["flags"]
    assert plans["int4"]["flags"].startswith("--preset=resident") and plans["int4"]["tokens_per_s"] > 100
    assert not plans["int4"]["exact"] and plans["runner_up"]["tokens_per_s"] < plans["best"]["tokens_per_s"]
    lossless, int8 = plans["lossless"], plans["int8"]
    assert lossless["exact"] and plans["best"]["tokens_per_s"] < lossless["tokens_per_s"] < int8["tokens_per_s"]
    assert lossless["first"] == "specmoe convert --format=specmoe --expert_packing=lossless"
    again = shown(explain(*asked[:-1], *plans["best"]["flags"].split(), "--json"))  # the flags are the plan
    assert again["tokens_per_s"] == pytest.approx(plans["best"]["tokens_per_s"], rel=0.01)
    lines = explain(*asked).out.splitlines()
    assert lines[0] == "one request at a time" and lines[1].startswith("  best ") and max(map(len, lines)) <= 80
    assert f"        first: {lossless['first']}" in lines
    exact = shown(explain(*asked, "--json", "--dtype=float32"))["advice"]["1"]
    assert "lossless" not in exact and "int8" in exact  # 12 bits hold bfloat16


def test_it_notices_that_everything_fits(explain, headers):
    found = shown(explain(f"--model={headers['qwen3_30b_a3b']}", "--hardware=h100", "--json"))
    assert list(found["advice"]) == ["1", "64"]
    for plans in found["advice"].values():
        assert "--preset=resident" in plans["best"]["flags"] and "every expert is there" in plans["best"]["unused"]
        assert "int4" not in plans


def test_what_does_not_fit_into_host_memory_is_left_on_disk(explain, headers):
    found = shown(explain(f"--model={headers['mixtral_8x7b']}", "--hardware=4090", "--requests=1", "--json"))
    best = found["advice"]["1"]["best"]
    assert "--expert_tier=disk" in best["flags"] and best["binding_resource"] == "disk" and "GiB" in best["unused"]


def test_a_cpu_that_lacks_memory_for_all_experts_leaves_them_on_disk(explain, headers, monkeypatch):
    """Its computation takes of the same memory as the cache of experts."""
    memory = 20 * GIB
    mine = machine("l4").replace(
        name="mine", measured=True, accelerator_is_cpu=True, accelerator_memory_bytes=memory, host_memory_bytes=memory
    )
    monkeypatch.setattr("specmoe_jax.cli.flag_groups.machine_flag.probe", lambda **_: mine)
    plans = shown(explain(f"--model={headers['qwen3_30b_a3b']}", "--requests=1", "--json"))["advice"]["1"]
    best = plans["best"]
    assert best["exact"] and "--expert_tier=disk" in best["flags"]
    assert best["accelerator_gib"] + best["host_gib"] <= 20
    assert plans["lossless"]["tokens_per_s"] > best["tokens_per_s"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "draft=self: 0.6 a token, ASSUMED; specmoe plan --prompts=FILE measures it"),
        (("--acceptance=0.5",), "draft=self: 0.5 a token, given or measured"),
        (("--preset=specmoeoff",), "draft=eagle: that of the EAGLE head of SpecMoEOff's Mixtral, ASSUMED"),
        (("--preset=specmoeoff",), "it needs a trained head (--draft_head), and none is given"),
    ],
)
def test_an_acceptance_says_where_it_is_from(explain, headers, flags, said):
    preset = () if any("preset" in flag for flag in flags) else ("--preset=specmoe",)
    found = shown(explain(f"--model={headers['mixtral_8x7b']}", "--hardware=h100", "--json", *preset, *flags))
    assert any(said in line for line in found["assumptions"])


def test_a_head_that_is_there_is_planned_with(explain):
    """The bundled model's own; its sizes are in the account."""
    found = shown(explain("--model=demo", "--hardware=l4", "--draft_head=demo", "--requests=64", "--json"))
    assert "--draft=eagle" in found["advice"]["64"]["best"]["flags"] or "specmoeoff" in found["advice"]["64"]["best"]["flags"]
    assert not any("none is given" in line for line in found["assumptions"])
    simulated = shown(explain("--model=demo", "--hardware=l4", "--draft_head=demo", "--simulate", "--json"))
    assert "specmoeoff" in simulated["presets"]


def test_a_partial_file_says_what_it_takes_from_elsewhere(explain, tmp_path):
    (tmp_path / "mine.json").write_text('{"name": "mine", "like": "l4", "host_memory_bytes": 2e11}')
    found = shown(explain("--model=demo", "--hardware=mine.json", "--preset=specmoe", "--json"))
    assert any(line.startswith("not in mine.json, so as in l4: up_bytes_per_s,") for line in found["assumptions"])


def test_every_field_of_a_plan_that_generate_takes_can_be_asked_about(explain, explain_script, generate_script):
    named = {spec.flag for spec in explain_script.plan_flags.FIELDS.values()}
    assert named <= set(generate_script.flags.FLAGS) & set(explain_script.flags.FLAGS)
    asked = ("--model=demo", "--hardware=a30", "--preset=streaming", "--batch_size=4", "--json")
    two, three = (shown(explain(*asked, f"--layer_buffers={count}"))["accelerator_gib"]["all"] for count in (2, 3))
    config = load_config(checkpoint_path("demo"))
    assert (three - two) * GIB == pytest.approx(config.num_experts * config.expert_params * 2)  # bfloat16


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--hardware=abacus"], "known are a30"),
        (["--hardware=h1000"], "did you mean h100?"),
        (["--hardware=a30", "--preset=specmoe", "--draft_head=demo"], "--draft_head has no effect with draft=self"),
        (["--hardware=a30", "--preset=specmoe", "--requests=3"], "--requests has no effect with a plan or a preset"),
        (["--hardware=no/such.json"], "cannot read the hardware"),
        (["--hardware=a30", "--acceptance=often"], "probability"),
        (["--hardware=a30", "--preset=on_demand", "--gantt=x.png"], "streaming or specmoeoff"),
        (["--hardware=a30", "--simulate", "--trace=nothing.npy"], "cannot read the trace"),
        (["--hardware=a30", "--draft=ngram", "--prefetch=draft"], "prefetch=draft has no effect"),
        (["--hardware=a30", "--skew=0.9"], "experts a token allow"),
        (["--hardware=a30", "--trace=x.npy"], "--trace has no effect without --simulate"),
        (["--hardware=a30", "--simulate", "--gantt=x.png"], "--gantt has no effect with --simulate"),
    ],
)
def test_wrong_usage_is_one_line(explain, arguments, says):
    ran = explain("--model=demo", *arguments)
    assert ran.code in (1, 2) and says in ran.err and ran.err.count("\n") == 1


def test_pictures(explain, tmp_path):
    pytest.importorskip("matplotlib")
    ran = explain(
        "--model=demo", "--hardware=a30", "--preset=streaming", "--batch_size=8", f"--roofline={tmp_path / 'roofline.png'}",
        f"--gantt={tmp_path / 'pass.png'}",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("roofline.png", "pass.png"))


QUANTISED = [
    (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "FP8 in blocks of 128 x 128, 8 bits a weight, whose experts stay packed",
        8.002,
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        "AWQ INT4 in groups of 128, 4.16 bits a weight, whose experts stay packed",
        4.156,
    ),
    (None, None, 16.0),
]


@pytest.mark.parametrize(("form", "words", "bits"), QUANTISED)
def test_config_alone_predicts_the_bytes_on_disk(explain, form, words, bits, tmp_path):
    """Of a quantised checkpoint those of its form, which is named, beside what it would take in memory."""
    raw = CONFIGS["qwen3_30b_a3b"] | ({"quantization_config": form} if form else {})
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    found = shown(explain(f"--model={tmp_path}", "--hardware=h200", "--preset=on_demand", "--json"))
    embedding_and_head = 2 * 151_936 * 2_048 * 2 / GIB  # stay in bfloat16
    assert found["disk_gib"] == pytest.approx((56.9 - embedding_and_head) * bits / 16 + embedding_and_head, rel=0.01)
    assert found.get("weights", "") == "" if words is None else words in found["weights"]
