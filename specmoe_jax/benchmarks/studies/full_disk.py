"""Runs a job on tmpfs disks that are too small, gives each more room and runs it again: it must go on and end the same.

Needs the right to mount (run it as root in a container); not a test that pytest collects. The caches of the run (affinity,
compiled programs), its output, figures and metrics are all on the small disk, so that it fills in whatever phase writes:
    python -m specmoe_jax.benchmarks.studies.full_disk --folder=/tmp/small_disk
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

SIZES_KIB = (16, 64, 256, 1024, 2048, 3072)
TEXTS = [f"Call me Ishmael, said number {i}." for i in range(60)]


def run(folder: pathlib.Path, prompts: pathlib.Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "specmoe_jax",
        "generate",
        f"--prompts={prompts}",
        f"--output={folder / 'out.jsonl'}",
        f"--stats={folder / 'stats.json'}",
        f"--metrics_file={folder / 'metrics.prom'}",
        "--preset=specmoe",
        "--max_new_tokens=200",
        "--ignore_eos",
    ]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")})


def lines(folder: pathlib.Path) -> list[bytes]:
    path = folder / "out.jsonl"
    return sorted(path.read_bytes().splitlines(keepends=True)) if path.exists() else []


def mounted(folder: pathlib.Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder.with_name(folder.name + "_prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    expected = None
    for size in (0, *SIZES_KIB):  # 0: no limit, the run to compare with
        mounted(folder, f"size={size}k" if size else "size=1g")
        try:
            first = run(folder, prompts)
            held = lines(folder)
            assert all(line.endswith(b"\n") for line in held), "a line was cut"
            assert not list(folder.glob("*.partial")), "something half-written was left"
            if size:
                assert "Traceback" not in first.stderr, first.stderr
                subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
                second = run(folder, prompts)
                assert second.returncode == 0, second.stderr
                assert set(held) <= set(lines(folder)) and lines(folder) == expected, "the files differ"
            expected = lines(folder)
            kept = f"{len(held)} of {len(TEXTS)} requests kept"
            said = next((line for line in first.stderr.splitlines() if line.startswith("error:")), "through")
            print(
                f"{size or 'unlimited'} KiB: exit {first.returncode}, {kept}; {said[:120]}",
                flush=True,
            )
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    prompts.unlink()


if __name__ == "__main__":
    main()
