"""The SpecMoEOff suite: tables in the shape of the paper's figures 8 to 13 and table 3, against `streaming`: no speculation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specmoe_jax.benchmarks.rounds import Case, Job, compare, whole_jobs
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Engine
from specmoe_jax.kv_cache.positions import KV_PAGE, pages_of
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.planner.workload import EAGLE_MIXTRAL
from specmoe_jax.support import tracing
from specmoe_jax.support.timing import Stopwatch

# Mixtral's proportions (group of 4, F = 3.5 M, 8 experts, top-2), small enough for a CPU that is the accelerator too.
MIXTRAL_SHAPED = ModelConfig(
    family="mixtral",
    vocab_size=4096,
    hidden_size=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    expert_hidden=896,
    num_experts=8,
    experts_per_token=2,
    max_positions=4096,
    rope_theta=1e6,
    norm_eps=1e-5,
    tie_embeddings=False,
    eos_token_ids=(),
)

# Drafted tokens accepted by EAGLE on Mixtral, by nodes drafted: the paper's map, which begins at 2. That of 1 is assumed here.
ACCEPTED = {1: 0.35} | {nodes: mean for nodes, mean in EAGLE_MIXTRAL if nodes <= 10}


class Setting(NamedTuple):
    """What all tables of a run share.

    link_bytes_per_s: of the emulated link. synthetic: whether acceptance is the paper's map. length: drafted tokens where
    they are not swept. job: (batch, prompt tokens) -> Job. prompt: tokens of a prompt where they are not swept.
    """

    model: Model
    head: EagleHead
    link_bytes_per_s: float
    synthetic: bool
    length: int
    batches: tuple[int, ...]
    prompt: int
    job: Callable[[int, int], Job]
    quick: bool

    @property
    def largest(self) -> int:
        return max(self.batches)

    def streaming(self, batch: int, **changes) -> Plan:
        shared = {"batch_size": batch, "link_bytes_per_s": self.link_bytes_per_s, "dtype": self.model.dtype}
        return preset("streaming", self.model.config).replace(**(shared | changes))

    def specmoeoff(self, batch: int, length: int, **changes) -> Plan:
        rate = acceptance_of(length) if self.synthetic else None
        drafted = {"draft": "eagle", "draft_length": length, "synthetic_acceptance": rate}
        return self.streaming(batch, **(drafted | changes)).replace(preset="specmoeoff")

    def both(self, batch: int, length: int, **changes) -> list[Case]:
        return [
            Case("streaming", self.streaming(batch, **changes)),
            Case("specmoeoff", self.specmoeoff(batch, length, **changes), "streaming", self.head),
        ]

    def ends(self, values: tuple) -> tuple:
        return values[:: len(values) - 1] if self.quick and len(values) > 2 else values


def acceptance_of(length: int) -> float:
    """Probability per token with which a chain of `length` drafted tokens gets as many accepted as the paper's map says."""
    wanted = float(np.interp(length, list(ACCEPTED), list(ACCEPTED.values())))
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(1, length + 1)) < wanted else (low, middle)
    return round(low, 4)


def mixtral_shaped(dtype: str = "float32") -> tuple[Model, EagleHead]:
    """A random model and a random head of the published network's proportions; their text means nothing."""
    model = random_model(MIXTRAL_SHAPED, seed=0, dtype=dtype)
    return model, random_head_of(model)


def random_head_of(model: Model) -> EagleHead:
    return eagle.random_head(head_config_of(model), model)


def head_config_of(model: Model) -> EagleConfig:
    """Of a head as wide as its model, whose experts' width its own layer has too."""
    config = model.config
    raw = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
    }
    return eagle_config.parse_config(raw, config, fused=False)


def batches(s: Setting) -> dict:
    """Figure 8: throughput over batch sizes."""
    rows = {}
    for batch in s.batches:
        rows |= _rows(s, s.both(batch, s.length), f"batch {batch}", s.job(batch, s.prompt))
    return rows


def draft_lengths(s: Setting) -> dict:
    """Figure 12: draft length 1 to 10 at the largest batch."""
    cases = [Case("streaming", s.streaming(s.largest))]
    for n in s.ends((1, 2, 3, 4, 5, 6, 8, 10)):
        cases.append(Case(f"length {n}", s.specmoeoff(s.largest, n), "streaming", s.head))
    return _rows(s, cases, f"batch {s.largest}", s.job(s.largest, s.prompt))


def prompts(s: Setting) -> dict:
    """Figure 9: input lengths at the largest batch."""
    rows = {}
    for tokens in s.ends((64, 256, 512, 1024)):
        rows |= _rows(s, s.both(s.largest, s.length), f"prompt {tokens}", s.job(s.largest, tokens))
    return rows


def output_lengths(s: Setting) -> dict:
    """Output lengths at the largest batch, as whole jobs: prefill, growing contexts and the tail of the last requests."""
    rows = {}
    for tokens in s.ends((16, 32, 64, 128)):
        job = s.job(s.largest, s.prompt)._replace(tokens=tokens)
        rows |= _rows(s, s.both(s.largest, s.length), f"output {tokens}", job, measure=whole_jobs)
    return rows


def micro_batches(s: Setting) -> dict:
    """Micro-batches in flight: where the CPU is the accelerator too, they only cost."""
    cases = [Case("1", s.streaming(s.largest))]
    cases += [Case(str(m), s.streaming(s.largest, micro_batches=m), "1") for m in (2, 4) if s.largest % m == 0]
    return _rows(s, cases, f"batch {s.largest}", s.job(s.largest, s.prompt))


def layer_buffers(s: Setting) -> dict:
    """Beyond the paper: more layer buffers keep the link busy while drafting; two are the paper's."""
    cases = [Case("2", s.specmoeoff(s.largest, s.length), None, s.head)]
    for count in range(3, s.model.config.num_moe_layers + 1):
        cases.append(Case(str(count), s.specmoeoff(s.largest, s.length, layer_buffers=count), "2", s.head))
    return _rows(s, cases, f"batch {s.largest}", s.job(s.largest, s.prompt))


def host_memory(s: Setting) -> dict:
    """Figure 10: host memory for the KV cache, as a share of what the largest batch fills: fewer rows run at a time."""
    rows = {}
    for share in s.ends((0.25, 0.5, 1.0)):
        batch = max(int(s.largest * share), 1)
        rows |= _rows(s, s.both(batch, s.length), f"{share:.2f} of the cache", s.job(batch, s.prompt))
    return rows


def device_memory(s: Setting) -> dict:
    """Accelerator memory: what the layer buffers leave holds whole layers, up to two thirds, which do not cross again."""
    rows, layers = {}, s.model.config.num_moe_layers
    for pinned in s.ends(tuple(sorted({min(layers * share // 12, layers - 2) for share in (0, 3, 6, 8)}))):
        job = s.job(s.largest, s.prompt)
        rows |= _rows(s, s.both(s.largest, s.length, pinned_layers=pinned), f"{pinned} of {layers} layers pinned", job)
    return rows


def draft_memory(s: Setting) -> dict:
    """Accelerator memory of the draft's cache, as a share of what whole jobs fill at most; the rest is attended by the CPU."""
    job = s.job(s.largest, s.prompt)
    plan = s.specmoeoff(s.largest, s.length)
    longest = max(map(len, job.prompts)) + job.tokens + plan.lookahead
    page, pages = KV_PAGE * eagle.position_bytes(s.head), len(job.prompts) * pages_of(longest)
    cases = [Case("all", plan, None, s.head)]
    for share in s.ends((0.75, 0.5, 0.25, 0.1)):
        cases.append(Case(f"{share:.2f}", plan.replace(draft_kv_bytes=max(int(share * pages), 1) * page), "all", s.head))
    return _rows(s, cases, f"batch {s.largest}", job, measure=whole_jobs)


def breakdown(s: Setting) -> dict:
    """Table 3: one iteration in parts, against its bound and the plain sum of the parts.

    compute: the same plan without an emulated link, so what the cores need. The bound is max(link, compute), because CPU and
    accelerator are the same cores here; on a machine with an accelerator it is the longest lane.
    """
    cases = s.both(s.largest, s.length)
    together = _rows(s, cases, "", s.job(s.largest, s.prompt))
    for case in cases:
        row = together.pop(f"{case.name} @ ")
        alone = compare(
            s.model,
            [case._replace(name="compute", plan=case.plan.replace(link_bytes_per_s=None), base=None)],
            s.job(s.largest, s.prompt),
        )
        compute_s = alone["compute"]["step_latency_s"]
        link_s = row["link_bytes_per_step"] / s.link_bytes_per_s
        parts = lanes(s, case)
        together[f"{case.name}, iteration"] = row | {
            "link_s": link_s,
            "compute_s": compute_s,
            "iteration_over_floor": row["step_latency_s"] / max(link_s, compute_s),
            "iteration_over_sum": row["step_latency_s"] / (link_s + compute_s),
            "lanes_s": parts,
        }
    return together


def lanes(s: Setting, case: Case) -> dict[str, float]:
    """Seconds that each lane works in one iteration; noted in a run of its own, because noting costs."""
    spans: list[tracing.Span] = []
    engine = Engine(s.model, case.plan, draft_head=case.head, spans=spans)
    state = engine.init(s.job(s.largest, s.prompt).prompts, SamplingParams(max_new_tokens=64, ignore_eos=True))
    state, _ = engine.step(state)
    spans.clear()
    watch, steps = Stopwatch(), 3
    for _ in range(steps):
        state, _ = engine.step(state)
    return {lane: seconds / steps for lane, seconds in tracing.busy_s(spans).items()} | {"wall": watch.seconds / steps}


TABLES = {
    "batches": batches,
    "draft_lengths": draft_lengths,
    "prompts": prompts,
    "output_lengths": output_lengths,
    "micro_batches": micro_batches,
    "layer_buffers": layer_buffers,
    "host_memory": host_memory,
    "device_memory": device_memory,
    "draft_memory": draft_memory,
    "breakdown": breakdown,
}


def _rows(s: Setting, cases: list[Case], where: str, job: Job, measure=compare) -> dict:
    results = measure(s.model, cases, job)
    return {f"{name} @ {where}": figures | {"case": name, "batch": len(job.prompts)} for name, figures in results.items()}
