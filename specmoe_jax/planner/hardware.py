"""What a machine can do, as numbers: rates, memories, fixed costs, and how much of a peak each kind of operator reaches. Pure.

`machines.py` holds known machines as data; the probe measures the one at hand. Rates are decimal (1 GB/s = 1e9 bytes/s), memories
bytes. A rate is a peak; a rate times an efficiency is the expected rate of an operator.
"""

import dataclasses
import json
import math
from typing import NamedTuple

from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.validation import is_whole

# Kinds of operators that have efficiencies of their own.
OPERATORS = (
    "dense",  # projections, routers, dense MLPs and the head, on the accelerator
    "experts",  # the routed experts' FFN, on the accelerator
    "attention",  # over a cache on the accelerator
    "cpu_attention",  # chunked attention over a cache in host memory
    "stream",  # experts over the link
    "copy",  # activations over the link, either way
    "read",  # experts from disk
)


class Efficiency(NamedTuple):
    """An operator's duration is max(flops / (peak * compute), bytes / (rate * memory)) + overhead_s. Shares are in (0, 1.5].

    Above 1: the probed peak was too low (caches, for example).
    """

    compute: float = 1.0
    memory: float = 1.0
    overhead_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine: an accelerator, the CPU and memory beside it, the link between them, a disk. Raises PlanError for no numbers.

    devices: accelerators alike, each with its own memory and link; host memory and disk are all devices'. hosts: machines alike
    that hold as many of them each; devices and host_memory_bytes are then of all together, all else of one. network_bytes_per_s: of
    a host to others, each way; 0: unknown.

    measured: by the probe; False: data sheets and papers, with assumed efficiencies. accelerator_is_cpu: the accelerator's
    tasks and
    the CPU's run on the same cores (no accelerator): they add up instead of overlapping.
    overlap: share of a transfer that hides behind computation of the same length.
    efficiencies: of some OPERATORS; the others have Efficiency(). spreads: relative half-width of the interval of some figures,
    by field name or operator; `spread` gives the default of what is not there.
    """

    name: str
    up_bytes_per_s: float  # host -> accelerator
    down_bytes_per_s: float
    accelerator_flops_float32: float
    accelerator_flops_bfloat16: float
    accelerator_bytes_per_s: float
    accelerator_memory_bytes: float
    cpu_flops_float32: float
    cpu_flops_bfloat16: float
    dram_bytes_per_s: float
    host_memory_bytes: float
    disk_bytes_per_s: float
    task_s: float = 0.0  # of one program dispatched to the accelerator
    sync_s: float = 0.0  # of one wait of the host for it
    copy_s: float = 0.0  # of one copy, whatever its size
    step_s: float = 0.0  # of one step, on the host: acceptance, requests, bookkeeping
    peer_bytes_per_s: float = 0.0  # between two accelerators, each way; 0: unknown
    devices: int = 1
    network_bytes_per_s: float = 0.0
    hosts: int = 1
    accelerator_is_cpu: bool = False
    overlap: float = 1.0
    measured: bool = False
    efficiencies: tuple[tuple[str, Efficiency], ...] = ()
    spreads: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and (not _is_finite(value) or value < 0 or (value == 0 and field.default != 0.0)):
                raise PlanError(f"hardware {self.name}: {field.name} is {value!r}; it must be a finite number above 0")
        for figure in ("devices", "hosts"):
            if not is_whole(count := getattr(self, figure)) or count < 1:
                raise PlanError(f"hardware {self.name}: {figure} is {count!r}; it must be a whole number of at least 1")
        if not 0 < self.overlap <= 1:
            raise PlanError(f"hardware {self.name}: overlap is {self.overlap!r}; it must be above 0 and at most 1")
        for operator, efficiency in self.efficiencies:
            _check_efficiency(self.name, operator, efficiency)
        for figure, value in self.spreads:
            if figure not in (*_RATES, *OPERATORS) or not _is_finite(value) or value < 0:
                raise PlanError(f"hardware {self.name}: spread of {figure!r} is {value!r}; it must be 0 or more, of a known figure")

    def cluster(self, devices: int) -> "Hardware":
        """So many of its accelerators; more than it has are in further machines like it, which hold the experts together."""
        hosts = -(-devices // self.devices)
        return self.replace(devices=devices, hosts=hosts, host_memory_bytes=hosts * self.host_memory_bytes)

    def accelerator_flops(self, dtype: str) -> float:
        """Peak of a dtype of the plan."""
        return {"float32": self.accelerator_flops_float32, "bfloat16": self.accelerator_flops_bfloat16}[dtype]

    def cpu_flops(self, dtype: str) -> float:
        """Peak of a dtype of the plan."""
        return {"float32": self.cpu_flops_float32, "bfloat16": self.cpu_flops_bfloat16}[dtype]

    def efficiency(self, operator: str) -> Efficiency:
        """Of one of OPERATORS."""
        return dict(self.efficiencies).get(operator, Efficiency())

    def spread(self, figure: str) -> float:
        """Relative half-width of a rate (by field name) or of an operator's duration: as given, else 0.05 measured, 0.2 assumed."""
        return dict(self.spreads).get(figure, 0.05 if self.measured else 0.2)

    def replace(self, /, **changes) -> "Hardware":
        """A copy with some figures changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["efficiencies"] = {operator: efficiency._asdict() for operator, efficiency in self.efficiencies}
        return json.dumps(fields | {"spreads": dict(self.spreads)}, indent=2)

    @staticmethod
    def from_json(text: str) -> "Hardware":
        """Reads what `to_json` wrote; figures that have a default may be left out. Raises PlanError for anything else."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"the hardware is not JSON ({e}); write one with Hardware.to_json") from e
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise PlanError('the hardware is not a JSON object with a "name"; write one with Hardware.to_json')
        raw = {_EARLIER_NAMES[name] if name in _EARLIER_NAMES else name: value for name, value in raw.items()}
        fields = {field.name: field for field in dataclasses.fields(Hardware)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        wrong = sorted((set(raw) - set(fields)) | (required - set(raw)))
        if wrong:
            raise PlanError(f"hardware {raw['name']}: unknown or missing {', '.join(wrong)}; its figures are {', '.join(fields)}")
        try:
            efficiencies = tuple((name, Efficiency(**value)) for name, value in raw.pop("efficiencies", {}).items())
            spreads = tuple(raw.pop("spreads", {}).items())
        except (AttributeError, TypeError) as e:
            raise PlanError(f"hardware {raw['name']}: efficiencies or spreads are no objects of known figures ({e})") from e
        return Hardware(**raw, efficiencies=efficiencies, spreads=spreads)


_EARLIER_NAMES = {"shared_cores": "accelerator_is_cpu"}  # of figures in files that earlier versions wrote
_RATES = tuple(field.name for field in dataclasses.fields(Hardware) if field.type is float)


def _check_efficiency(name: str, operator: str, efficiency: Efficiency) -> None:
    compute, memory, overhead_s = efficiency
    if operator not in OPERATORS:
        raise PlanError(f"hardware {name}: efficiency of {operator!r}; operators are {', '.join(OPERATORS)}")
    if not all(_is_finite(share) and 0 < share <= 1.5 for share in (compute, memory)):
        raise PlanError(f"hardware {name}: efficiency of {operator} is {compute!r}, {memory!r}; shares are above 0, at most 1.5")
    if not _is_finite(overhead_s) or overhead_s < 0:
        raise PlanError(f"hardware {name}: overhead_s of {operator} is {overhead_s!r}; it must be 0 or more seconds")


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


assert DTYPES == ("float32", "bfloat16"), "a dtype of the plan needs its own peaks"
