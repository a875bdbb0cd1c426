"""The ablation at equal accelerator memory, timed: every idea alone, and the best rows again with experts in 12 bits without loss.

    python -m specmoe_jax.benchmarks.studies.ideas.packed --folder=DIR --batches=1,4,16 --link_gbps=0.025 --output=packed.json
    python -m specmoe_jax.benchmarks.studies.ideas.packed --model=nllb_shaped --batches=256 --temperature=0 \\
        --link_gbps=0.01 --draft_experts=4 --alone

DIR keeps both converted forms of the model, unless it is random (models/synthetic.py) and its acceptance synthetic. Experts are
bfloat16. Rows in 12 bits have as many slots as fit into the bytes of the others' slots: those of a layer's dispatch, and N for each
layer. Both write the same tokens where the sampling is deterministic. --output keeps the rows that it holds already, but for those
measured again; benchmarks/plots.py draws it.
"""

import argparse
import json
import pathlib

import specmoe_jax as sm
from specmoe_jax.benchmarks.rounds import Case, Job, compare
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.benchmarks.studies.ideas.evictions import texts
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing.registry import LOSSLESS
from specmoe_jax.models.quantised import quantise
from specmoe_jax.models.synthetic import SHAPES, shaped_model, synthetic_prompts

DEMAND = {"retain": True, "retain_policy": "drafted"}
KEPT = (  # of a row, in --output
    "decode_tokens_per_s ratios link_bytes_per_token tokens_per_step peak_accelerator_bytes steps base acceptance_by_position"
    " compilations_after_warmup synthetic"
).split()


def best(setting: Setting, batch: int, top: int) -> dict[str, Plan]:
    """The best of docs/benchmarks/ideas, what they stand beside, and the best cache. top: of a token's choices, in drafts."""
    kept = {"retain": True, "spare_slots": setting.experts * setting.model.config.num_moe_layers}
    return {
        "on_demand": setting.plan("on_demand", batch),
        "cache, expected": setting.plan("on_demand", batch, retain_policy="expected", **kept),
        "specmoe as published": setting.specmoe(batch),
        "+ retain": setting.specmoe(batch, retain=True),
        "+ retain, guard": setting.specmoe(batch, retain=True, guard=True),
        f"all, top {top}": setting.specmoe(batch, draft_stop="union", draft_top_k=top, **DEMAND),
    }


def alone(setting: Setting, batch: int, top: int) -> dict[str, Plan]:
    """Each idea by itself, on top of SpecMoE as published."""
    layers, fewer = setting.model.config.num_moe_layers, setting.experts // 2
    spare = (setting.experts - fewer) * layers
    return {
        "+ union stop": setting.specmoe(batch, draft_stop="union"),
        "+ retain by demand": setting.specmoe(batch, **DEMAND),
        f"+ top {top} of a token": setting.specmoe(batch, draft_top_k=top),
        "+ prefetch": setting.specmoe(batch, prefetch="draft", draft_experts=fewer, spare_slots=spare),
        "merged once": setting.specmoe(batch, draft="merged"),
        "merged each 4": setting.specmoe(batch, draft="merged", merge_every=4),
    }


def cases(setting: Setting, batch: int, mark: str, *, with_alone: bool) -> list[Case]:
    top = max(3 * setting.model.config.experts_per_token // 4, 1)
    plans = best(setting, batch, top) | (alone(setting, batch, top) if with_alone else {})
    names = {f"{name}{mark}": plan.replace(dtype="bfloat16") for name, plan in plans.items()}
    return [Case(name, plan, None if name == "on_demand" else "on_demand", model=setting.model) for name, plan in names.items()]


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
    parser.add_argument("--alone", action="store_true", help="each idea by itself too, in bfloat16")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    plain, packed = forms(options.model, options.folder)
    shape = SHAPES.get(options.model)
    acceptance, length = (shape.acceptance, shape.draft_length) if shape else (None, 4)
    counts = options.draft_experts, equal_experts(plain, packed, options.draft_experts)
    print(f"N = {counts[0]} of {plain.expert_bytes} bytes, in 12 bits {counts[1]} of {packed.expert_bytes}", flush=True)
    output: pathlib.Path | None = options.output
    found = json.loads(output.read_text(encoding="utf-8"))["tables"]["packed"] if output is not None and output.exists() else {}
    for batch in map(int, options.batches.split(",")):

        def job(batch: int) -> Job:
            prompts = synthetic_prompts(plain.config, batch, 17) if shape else texts(batch)
            return Job(prompts, options.rounds, options.tokens, temperature=options.temperature)

        settings = [
            Setting(model, options.link_gbps * 1e9, acceptance, experts, length, (batch,), job, quick=False)
            for model, experts in zip((plain, packed), counts, strict=True)
        ]
        rows = cases(settings[0], batch, "", with_alone=options.alone) + cases(settings[1], batch, " in 12 bits", with_alone=False)
        for name, row in compare(plain, rows, job(batch)).items():
            found[f"{name} @ {batch}"] = {"case": name, "batch": batch} | {key: row[key] for key in KEPT}
            ratios = row["ratios"]["decode_tokens_per_s"] if row["ratios"] else (1, 1, 1)
            print(
                f"{batch:>3} {name:<32}{row['decode_tokens_per_s']:8.1f} tokens/s"
                f" {ratios[0]:5.2f} ({ratios[1]:.2f}-{ratios[2]:.2f})"
                f"{row['link_bytes_per_token'] / 1e3:8.1f} kB/token {row['tokens_per_step']:5.2f} tokens/step"
                f"{row['peak_accelerator_bytes'] / 2**20:7.1f} MiB",
                flush=True,
            )
        if output is not None:
            document = {"suite": "ideas", "model": options.model, "tables": {"packed": found}}
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
