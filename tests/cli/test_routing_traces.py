"""--routing_traces: a file for each request beside the output, also of a job that went on, and what reads them."""

import json

import numpy as np

from specmoe_jax.engine import Completion
from specmoe_jax.engine.requests.routing import RequestRouting
from specmoe_jax.jobs.routing_traces import read_popularity, write_trace
from specmoe_jax.testing import TINY
from tests.cli.generate_cases import PROMPTS, prompt_flags

JOB = (*prompt_flags(), "--max_new_tokens=5", "--ignore_eos", "--preset=specmoe", "--draft_experts=2", "--batch_size=2")


def test_a_job_that_goes_on_has_all_of_its_traces(generate, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begin = (f"--model={checkpoint}", *JOB, "--output=o.jsonl")
    ran = generate(*begin, "--routing_traces=traces", "--routing_weights")
    assert ran.code == 0, ran.err
    files = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in files] == [f"{i:08d}.npz" for i in range(len(PROMPTS))]
    first = [{name: array.copy() for name, array in np.load(file).items()} for file in files]
    for prompt, trace in zip(PROMPTS, first, strict=True):
        tokens = len(prompt.encode())
        assert trace["prompt_tokens"] == tokens - 1
        assert trace["ids"].shape == trace["weights"].shape == (tokens - 1 + 5, TINY.num_moe_layers, TINY.experts_per_token)

    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    lost = json.loads(lines[-1])["index"]
    (tmp_path / "o.jsonl").write_text("".join(line + "\n" for line in lines[:-1]) + lines[-1][:9])
    files[lost].unlink()
    for flags, said in (
        ([], "routing"),
        (["--routing_traces=traces"], "routing"),
        (["--routing_traces=new", "--routing_weights"], "missing"),
    ):
        ran = generate(*begin, *flags)
        assert ran.code == 1 and said in ran.err and ran.err.count("\n") == 1
    ran = generate(*begin, "--routing_traces=traces", "--routing_weights")
    assert ran.code == 0, ran.err
    np.testing.assert_array_equal(np.load(files[lost])["ids"], first[lost]["ids"])


def test_explain_replays_them(explain, checkpoint, tmp_path):
    """As plain decoding of two requests at a time: five passes, then three of one row alone."""
    rng, folder, decoded = np.random.default_rng(0), tmp_path / "traces", []
    folder.mkdir()
    for index, (prompt, new) in enumerate([(3, 5), (0, 2), (1, 3)]):
        ids = np.stack([rng.permutation(TINY.num_experts)[:2] for _ in range((prompt + new) * 3)]).reshape(-1, 3, 2)
        write_trace(
            folder, Completion(index, None, "", (), "length", 1, routing=RequestRouting(ids.astype(np.uint8), None, prompt))
        )
        decoded.append(ids[prompt:])
    ran = explain(f"--model={checkpoint}", "--hardware=h100", "--simulate", "--json", "--trace=traces", "--batch_size=2")
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out)["cache"]
    assert shown["trace"] == "given, 8 passes, 3 layers, 5 experts"
    passes = [[ids[step] for ids in batch if step < len(ids)] for batch in (decoded[:2], decoded[2:]) for step in range(5)]
    assert shown["experts_needed"] == sum(
        len({int(e) for ids in rows for e in ids[layer]}) for rows in passes for layer in range(3)
    )
    ran = explain("--model=demo", "--hardware=h100", "--simulate", f"--trace={folder / '00000000.npz'}")
    assert ran.code == 1 and "a trace is of another model (3 layers" in ran.err and ran.err.count("\n") == 1


def test_popularity_is_the_sum_of_all_passes(tmp_path):
    ids = np.array([[[0, 1], [2, 3], [4, 0]], [[0, 2], [2, 4], [4, 1]], [[1, 0], [3, 2], [4, 3]]], np.uint8)
    write_trace(tmp_path, Completion(0, None, "", (), "length", 1, routing=RequestRouting(ids, None, 1)))
    expected = [[2, 1, 1, 0, 0], [0, 0, 2, 1, 1], [0, 1, 0, 1, 2]]  # of the two that were decoded
    assert read_popularity(tmp_path, TINY).tolist() == expected
    np.save(tmp_path / "counts.npy", np.array(expected))
    assert read_popularity(tmp_path / "counts.npy", TINY).tolist() == expected


def test_what_has_no_effect_is_refused(generate):
    ran = generate("--prompt=a", "--preset=on_demand", "--popularity=traces")
    assert ran.code == 1 and "cannot read the trace traces" in ran.err and ran.err.count("\n") == 1
    ran = generate("--prompt=a", "--preset=on_demand", "--devices=2", "--placement=popularity")
    assert ran.code == 1 and ran.err.count("\n") == 1
    ran = generate("--prompt=a", "--routing_weights")
    assert ran.code == 2 and "--routing_weights has no effect without --routing_traces" in ran.err
