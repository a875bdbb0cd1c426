"""How wrong the planner is on this machine: errors over plans unseen in fitting, and its choices against a measured sweep.

    python -m specmoe_jax.benchmarks.studies.measure_planner errors --output=errors.json
    python -m specmoe_jax.benchmarks.studies.measure_planner choices --output=choices.json

On idle cores only. The bundled model; link rates are emulated. The last line is one JSON document.
"""

import argparse
import json
import pathlib
import random
import sys

import jax

import specmoe_jax
import specmoe_jax as sm
from specmoe_jax.autotune.calibrate import calibrate
from specmoe_jax.autotune.choose import Job, know
from specmoe_jax.autotune.probe import probe
from specmoe_jax.autotune.profile import profile
from specmoe_jax.benchmarks.studies.planner_choices import SETTINGS, choices
from specmoe_jax.benchmarks.studies.planner_errors import Rounds, errors, unseen_plans
from specmoe_jax.benchmarks.studies.planner_heads import demo_head
from specmoe_jax.planner.measured.operators import as_table
from specmoe_jax.support.cache_files import cache_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "choices"])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--settings", type=int, nargs="*", default=range(len(SETTINGS)), help="of the choices, by number; default all"
    )
    parser.add_argument("--fresh", action="store_true", help="profile machine and operators again")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    model, texts = sm.load_model("demo"), held_out()
    probe(fresh=args.fresh)
    calibration = calibrate(model, texts[3::7], sm.SamplingParams(), head=demo_head(model))
    texts = [text for i, text in enumerate(texts) if i % 7 != 3]  # what is measured was not seen
    rounds = Rounds(model, unseen_plans(model.config), texts)
    operators = profile(model.config, fresh=args.fresh, progress=True, on_round=rounds.run if args.what == "errors" else int)
    print(as_table(operators), file=sys.stderr)
    known = know(model.config, "float32", model.path, Job(prompt_tokens=40, new_tokens=32))
    known = known._replace(operators=operators, calibration=calibration)
    print(calibration, file=sys.stderr, flush=True)
    document = errors(model, rounds, known) if args.what == "errors" else choices(model, texts, known, list(args.settings))
    document["calibration"] = calibration.to_dict()
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def held_out() -> list[str]:
    path = pathlib.Path(specmoe_jax.__file__).parent / "checkpoints" / "demo" / "held_out.txt"
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(texts)  # neighbours are of one book, and choose alike
    return texts


if __name__ == "__main__":
    main()
