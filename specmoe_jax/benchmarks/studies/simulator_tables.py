"""By hand: the speed-up of speculation on SpecMoEOff's machines, as docs/planner.md has it; arithmetic alone.

python -m specmoe_jax.benchmarks.studies.simulator_tables
"""

import specmoe_jax as sm
from specmoe_jax.benchmarks.gpu.shapes import mixtral_8x7b
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.support.units import GIB

MIXTRAL = mixtral_8x7b(32)
BESIDE_BYTES, TOKEN_BYTES = 90 * GIB, 128 * 1024  # what reproduces both batches of the paper at 566 + 1024 tokens
LENGTHS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    print("| input + output | " + " | ".join(f"{name}, k = 5 | best k" for name in ("A30", "4090D")) + " |\n|---|---|---|---|---|")
    for prompt, new in ((566, 128), (566, 1024), (1006, 128), (1006, 1024)):
        cells = [cell for name in ("a30", "4090d") for cell in speed_ups(name, prompt, new)]
        print(f"| {prompt} + {new} | " + " | ".join(cells) + " |")


def speed_ups(name: str, prompt: int, new: int) -> tuple[str, str]:
    """Tokens/s over those without a draft, at k = 5 and at the best k. The engine's own memory limits are left out."""
    hardware, workload = machine(name), Workload(prompt_tokens=prompt, new_tokens=new, acceptance=EAGLE_MIXTRAL, skew=0.32)
    batch = int((hardware.host_memory_bytes - BESIDE_BYTES) / (TOKEN_BYTES * (prompt + new))) // 2 * 2

    def rate(preset: str, **changes) -> float:
        plan = sm.PRESETS[preset](MIXTRAL).replace(dtype="bfloat16", batch_size=batch, micro_batches=2, **changes)
        return predict(MIXTRAL, plan, hardware, workload, budgets=False, interval=False).tokens_per_s

    base = rate("streaming")
    found = {length: rate("specmoeoff", draft_length=length) / base for length in LENGTHS}
    best = max(found, key=found.__getitem__)
    return f"{found[5]:.2f}", f"{found[best]:.2f} ({best})"


if __name__ == "__main__":
    main()
