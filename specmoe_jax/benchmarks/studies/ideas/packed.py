"""Rows of the ablation with bfloat16 experts as they are and in 12 bits without loss, at equal accelerator memory, timed:

    python -m specmoe_jax.benchmarks.studies.ideas.packed --folder=DIR --batches=1,4,16 --link_gbps=0.025
    python -m specmoe_jax.benchmarks.studies.ideas.packed --model=nllb_shaped --batches=256 --temperature=0 \\
        --link_gbps=0.01 --draft_experts=4

DIR keeps both converted forms of the model, unless it is random (models/synthetic.py) and its acceptance synthetic. Rows in 12 bits
have as many slots as fit into the bytes of the others' slots: those of a layer's dispatch, and N for each layer. Both write the
same tokens where the sampling is deterministic; here it is not.
"""

import argparse
import json
import pathlib

import specmoe_jax as sm
from specmoe_jax.benchmarks.rounds import Case, Job, compare
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.benchmarks.studies.ideas.evictions import texts
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing.registry import LOSSLESS
from specmoe_jax.models.quantised import quantise
from specmoe_jax.models.synthetic import SHAPES, shaped_model, synthetic_prompts

DEMAND = {"retain": True, "retain_policy": "drafted"}


def rows(setting: Setting, batch: int, mark: str) -> list[Case]:
    """The best of docs/benchmarks/ideas, what they stand beside, and the best cache."""
    kept = {"retain": True, "spare_slots": setting.experts * setting.model.config.num_moe_layers}
    top = max(3 * setting.model.config.experts_per_token // 4, 1)
    plans = {
        "on_demand": setting.plan("on_demand", batch),
        "cache, expected": setting.plan("on_demand", batch, retain_policy="expected", **kept),
        "specmoe as published": setting.specmoe(batch),
        "+ retain": setting.specmoe(batch, retain=True),
        "+ retain, guard": setting.specmoe(batch, retain=True, guard=True),
        f"all, top {top}": setting.specmoe(batch, draft_stop="union", draft_top_k=top, **DEMAND),
    }
    return [Case(f"{name}{mark}", plan.replace(dtype="bfloat16"), "on_demand", model=setting.model) for name, plan in plans.items()]


def equal_experts(plain: Model, packed: Model, experts: int) -> int:
    """N of the packed model, whose slots take no more bytes."""
    layers, dispatch = plain.config.num_moe_layers, plain.config.num_experts
    return ((dispatch + experts * layers) * plain.expert_bytes // packed.expert_bytes - dispatch) // layers


def forms(model: str, folder: pathlib.Path | None) -> tuple[Model, Model]:
    """The model in bfloat16, its experts as they are and in 12 bits."""
    if model in SHAPES:
        plain = shaped_model(model, dtype="bfloat16")
        return plain, quantise(plain, LOSSLESS)
    if folder is None:
        raise SystemExit("--folder is needed, for the converted forms of the checkpoint")
    for name, packing in (("plain", None), ("lossless", LOSSLESS)):
        if not (folder / name).exists():
            convert(model, folder / name, to="specmoe", dtype="bfloat16", packing=packing)
    return sm.load_model(str(folder / "plain"), dtype="bfloat16"), sm.load_model(str(folder / "lossless"), dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--model", default="demo", help=f"a checkpoint, or of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--link_gbps", type=float, default=0.025)
    parser.add_argument("--draft_experts", type=int, default=8, help="N of the plain model")
    parser.add_argument("--tokens", type=int, default=8, help="of a row and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--output")
    options = parser.parse_args()
    plain, packed = forms(options.model, options.folder)
    shape = SHAPES.get(options.model)
    acceptance, length = (shape.acceptance, shape.draft_length) if shape else (None, 4)
    counts = options.draft_experts, equal_experts(plain, packed, options.draft_experts)
    print(f"N = {counts[0]} of {plain.expert_bytes} bytes, in 12 bits {counts[1]} of {packed.expert_bytes}", flush=True)
    found = {}
    for batch in map(int, options.batches.split(",")):

        def job(batch: int) -> Job:
            prompts = synthetic_prompts(plain.config, batch, 17) if shape else texts(batch)
            return Job(prompts, options.rounds, options.tokens, temperature=options.temperature)

        settings = [
            Setting(model, options.link_gbps * 1e9, acceptance, experts, length, (batch,), job, quick=False)
            for model, experts in zip((plain, packed), counts, strict=True)
        ]
        cases = rows(settings[0], batch, "") + rows(settings[1], batch, " in 12 bits")
        for name, row in compare(plain, cases, job(batch)).items():
            found[f"{name} @ {batch}"] = row
            ratios = row["ratios"]["decode_tokens_per_s"] if row["ratios"] else (1, 1, 1)
            print(
                f"{batch:>3} {name:<32}{row['decode_tokens_per_s']:8.1f} tokens/s"
                f" {ratios[0]:5.2f} ({ratios[1]:.2f}-{ratios[2]:.2f})"
                f"{row['link_bytes_per_token'] / 1e3:8.1f} kB/token {row['tokens_per_step']:5.2f} tokens/step"
                f"{row['peak_accelerator_bytes'] / 2**20:7.1f} MiB",
                flush=True,
            )
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
