"""The whole road of a published checkpoint at real proportions: explain, convert, generate, and transformers' tokens beside.

    python -m specmoe_jax.benchmarks.studies.published.road --folder=DIR [--forms=qwen3_bf16,...] [--tokenizers=DIR]

Each step is a command in a process of its own, with its seconds and its peak memory. The reference is transformers in float32
on the weights that the quantised numbers stand for, also a process of its own; greedy, 32 tokens a prompt. `--tokenizers` holds
a folder `qwen3` and a folder `gptoss` with the published tokenizer files; without it prompts are token ids. NLLB-MoE's router
needs transformers 4.57, whose Python `--nllb_python` names; without it that comparison is left out, and said so.
The checkpoints are random (checkpoints.py): the figures say what loading and exactness are, not what a text is.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np

PRESETS = ("resident", "on_demand", "specmoe")
TEXTS = (
    "Call me Ishmael. Some years ago",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "東京は日本の首都です。🗼",
    "  leading spaces and <|im_end|> inside",
)
NEW_TOKENS = 32
REFERENCE = """
import json, sys
import torch, transformers
folder, prompts, count, encoder = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
kind = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
model = kind.from_pretrained(folder, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None  # an end token is a token like another, as with --ignore_eos
rows = []
for ids in prompts:
    ids = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=count)
    rows.append(out[0, 1 if encoder else ids.shape[1]:].tolist())
print(json.dumps(rows))
"""


class Ran(NamedTuple):
    """seconds of the whole process; peak_bytes: of its resident memory."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str]) -> Ran:
    """Runs a command to its end; what it says on stderr is shown."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike getrusage
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ended with {process.returncode}")
    return Ran(time.perf_counter() - began, usage.ru_maxrss * 1024, output)


def specmoe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "specmoe_jax", *arguments]


def size_of(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def prompt_ids(folder: pathlib.Path, vocabulary: int) -> list[list[int]]:
    """The texts through the checkpoint's tokenizer, or random ids where it has none."""
    if (folder / "tokenizer.json").exists():
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    rng = np.random.default_rng(0)
    return [rng.integers(5, vocabulary, length).tolist() for length in (7, 12, 5, 9)]


def generated(model: pathlib.Path, folder: pathlib.Path, prompts: pathlib.Path, preset: str, *more: str) -> tuple[Ran, list, dict]:
    out, stats = folder / "out.jsonl", folder / "stats.json"
    flags = [f"--model={model}", f"--prompts={prompts}", f"--preset={preset}", f"--output={out}", f"--stats={stats}", "--restart"]
    ran = run(specmoe("generate", *flags, f"--max_new_tokens={NEW_TOKENS}", "--ignore_eos", "--temperature=0", *more))
    rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["index"])
    if failed := [row["error"] for row in rows if row.get("error")]:
        raise SystemExit(f"{model} with --preset={preset}: {failed[0]}")
    return ran, [row["token_ids"] for row in rows], json.loads(stats.read_text())


def road(name: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """All steps of one form; prints a line each."""
    from specmoe_jax.benchmarks.studies.published.checkpoints import FORMS, write_form

    def say(step: str, ran: Ran, more: str = "") -> None:
        print(f"{name:13} {step:20} {ran.seconds:7.1f} s  peak {ran.peak_bytes / 1e9:5.2f} GB  {more}", flush=True)

    tokenizers = pathlib.Path(options.tokenizers) if options.tokenizers else None
    if not (folder / "reference" / "config.json").exists():
        write_form(name, folder, tokenizers)
    published, converted = folder / "published", folder / "converted"
    config, encoder = FORMS[name].config, name == "nllb_bin"
    disk = size_of(published)
    print(f"{name:13} {'on disk':20} {disk / 1e9:7.2f} GB", flush=True)
    figures: dict[str, Any] = {"form": name, "disk_bytes": disk}
    ids = prompt_ids(published, config["vocab_size"])
    prompts = folder / "prompts.jsonl"
    rows = TEXTS if (published / "tokenizer.json").exists() else ids
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    say("explain", run(specmoe("explain", f"--model={published}", "--preset=specmoe", "--dtype=float32")))
    ran = run(specmoe("convert", f"--model={published}", f"--output={converted}", "--format=specmoe"))
    say("convert", ran, f"{size_of(converted) / disk:.2f} of the size")
    figures |= {"convert_s": ran.seconds, "convert_peak_bytes": ran.peak_bytes, "converted_bytes": size_of(converted)}
    tokens = {}
    forms = {"converted": converted} if encoder else {"published": published, "converted": converted}
    for form, model in forms.items():
        for preset in PRESETS if form == "converted" else PRESETS[:1]:
            ran, tokens[form, preset], stats = generated(model, folder, prompts, preset, "--dtype=float32")
            expert = stats.get("expert_bytes_per_token")
            say(
                f"{form} {preset}",
                ran,
                f"{len(ids)} prompts" + (f", {expert / 1e6:.1f} MB a token over the link" if expert else ""),
            )
            figures[f"{form}_{preset}"] = {"seconds": ran.seconds, "peak_bytes": ran.peak_bytes, "stats": stats}
    first = next(iter(tokens.values()))
    figures["presets_equal"] = all(rows == first for rows in tokens.values())
    python = options.nllb_python if encoder else sys.executable
    if python:
        ran = run([python, "-c", REFERENCE, str(folder / "reference"), json.dumps(ids), str(NEW_TOKENS), str(encoder)])
        reference = json.loads(ran.output.splitlines()[-1])
        same = sum(ours == theirs for ours, theirs in zip(first, reference, strict=True))
        figures |= {"reference_s": ran.seconds, "prompts_equal": same, "prompts": len(ids)}
        say("transformers", ran, f"{same} of {len(ids)} prompts with the same {NEW_TOKENS} tokens")
    else:
        print(f"{name:13} transformers         left out: give --nllb_python", flush=True)
    print(f"{name:13} presets and forms {'agree' if figures['presets_equal'] else 'DIFFER'}", flush=True)
    if FORMS[name].tokenizer and tokenizers is not None:
        chat = folder / "chat.jsonl"
        chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Who are you?"}]}) + "\n")
        say("chat", generated(converted, folder, chat, "resident")[0])
    return figures


def main() -> None:
    names = ("qwen3_bf16", "qwen3_fp8", "gptoss_mxfp4", "nllb_bin")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="an empty folder with 20 GB of room; each form is deleted when it is done")
    parser.add_argument("--forms", default=",".join(names))
    parser.add_argument("--tokenizers", help="a folder with qwen3/ and gptoss/")
    parser.add_argument("--nllb_python", help="a Python with transformers 4.57 and torch")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    options = parser.parse_args()
    unknown = set(options.forms.split(",")) - set(names)
    if unknown:
        parser.error(f"--forms has {sorted(unknown)}; it may have {', '.join(names)}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in options.forms.split(","):
        folder = pathlib.Path(options.folder) / name
        print(json.dumps(road(name, folder, options)), flush=True)
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
