"""lossless: bfloat16 in 12 bits, bit for bit. What a checkpoint in the mapped form may be converted to (conversion/convert.py).

The exponents of a row lie near its largest. Of each weight are kept: sign and mantissa in a byte, and in half a byte how far its
exponent is below its row's largest. The few that are farther than 15, zeros among them, are kept beside: places and bits.
A format of our own after the finding of DFloat11 (arXiv 2504.11651), which codes exponents in a variable number of bits: these are
more by a tenth, and every weight is found without those before it.
"""

from typing import Any

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section, border_biases, is_plain
from specmoe_jax.models.packing.matrices import MatrixKind, PublishedTensor, Sections, groups_of
from specmoe_jax.support.errors import CheckpointError

GROUP = 32  # columns whose order the compiled kernel decodes at once (cpu_ops/expert_ffn.h)
FARTHEST = 15  # exponents below the largest of a row
PER_EXCEPTION, LEAST_EXCEPTIONS = 512, 64  # weights for each exception that an expert has room for, and the room of the smallest
SIGN, MANTISSA = 0x80, 0x7F


class Lossless(MatrixKind):
    converted = True
    mark = ".lossless"  # no checkpoint publishes such matrices: only blocks that a conversion made are so

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        """One that no checkpoint has, so that a missing block is told."""
        return (PublishedTensor(self.mark, (rows, columns), ("U8",), _refuse),)

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        rows, model = (config.matrices, config.hidden), config.model
        room = LEAST_EXCEPTIONS + config.matrices * config.hidden * model // PER_EXCEPTION
        return {
            "signs_mantissas": Section((*rows, groups_of(model, GROUP) * GROUP), np.dtype(np.uint8)),
            "below": Section((*rows, groups_of(model, GROUP) * GROUP // 2), np.dtype(np.uint8)),
            # Among [matrices, F, M], ascending; the number of weights where there are no more.
            "places": Section((room,), np.dtype(np.int32)),
            "bits": Section((room,), np.dtype(np.uint16)),
            "largest": Section(rows, np.dtype(np.uint8)),
            "biases": border_biases(config),
        }

    def encode(self, config: ExpertConfig, core: np.ndarray) -> dict[str, np.ndarray]:
        """Raises CheckpointError for weights that are no bfloat16, or whose exponents are spread too far."""
        words = np.ascontiguousarray(core).view(np.uint32)
        if np.any(words & 0xFFFF):
            raise CheckpointError("experts are packed without loss from bfloat16 alone, these are float32; leave the packing out")
        bits = (words >> 16).astype(np.uint16)
        exponents = (bits >> 7 & 0xFF).astype(np.uint8)
        largest = np.maximum(exponents.max(axis=2), FARTHEST)
        below = largest[..., None] - exponents
        places, room = np.flatnonzero(below > FARTHEST), self.sections(config)["places"].shape[0]
        if len(places) > room:
            raise CheckpointError(
                f"{len(places)} of an expert's {bits.size} weights are too small beside the largest of their rows to be packed"
                f" without loss in 12 bits, at most {room} may be; leave the packing out"
            )
        filled = np.full(room, bits.size, np.int32)
        filled[: len(places)] = places
        halves = _grouped(np.minimum(below, FARTHEST).astype(np.uint8))
        return {
            "signs_mantissas": _grouped((bits >> 8 & SIGN | bits & MANTISSA).astype(np.uint8)),
            "below": halves[..., : GROUP // 2] | halves[..., GROUP // 2 :] << 4,
            "places": filled,
            "bits": np.concatenate([bits.reshape(-1)[places], np.zeros(room - len(places), np.uint16)]),
            "largest": largest,
        }

    def decode(self, config: ExpertConfig, parts, xp):
        halves = parts["below"].reshape(config.matrices, config.hidden, -1, GROUP // 2)
        below = _columns(xp.concatenate([halves & 15, halves >> 4], axis=-1), config.model)
        exponents = (parts["largest"][..., None] - below).astype(np.uint16)
        kept = _columns(parts["signs_mantissas"], config.model).astype(np.uint16)
        bits = ((kept & SIGN) << 8 | exponents << 7 | kept & MANTISSA).reshape(-1)
        places = parts["places"]
        if xp is np:
            used = places < bits.size
            bits[places[used]] = parts["bits"][used]
        else:
            bits = bits.at[places].set(parts["bits"], mode="drop")
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(config.matrices, config.hidden, config.model)

    def expert_is_finite(self, config: ExpertConfig, parts: Sections) -> bool:
        return bool(np.isfinite(self.decode(config, parts, np)).all())

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return Kernel("lossless") if is_plain(config) else None


def _grouped(values: np.ndarray) -> np.ndarray:
    """[matrices, F, M] -> [matrices, F, groups, GROUP]: the even fours of each group before the odd ones."""
    whole = np.pad(values, ((0, 0), (0, 0), (0, -values.shape[2] % GROUP)))
    return whole.reshape(*values.shape[:2], -1, GROUP // 8, 2, 4).swapaxes(-3, -2).reshape(*values.shape[:2], -1, GROUP)


def _columns(grouped: Any, columns: int) -> Any:
    """The other way: [matrices, F, M] of numbers in that order."""
    rows = grouped.shape[:2]
    return grouped.reshape(*rows, -1, 2, GROUP // 8, 4).swapaxes(-3, -2).reshape(*rows, -1)[..., :columns]


def _refuse(parts: Sections, values: np.ndarray) -> None:
    raise ValueError("no checkpoint publishes matrices so")


def kind(parameters: str) -> Lossless:
    return Lossless()
