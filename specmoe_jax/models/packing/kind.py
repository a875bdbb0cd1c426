"""What a packing kind says of itself."""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig


class Section(NamedTuple):
    """A part of the bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Kernel(NamedTuple):
    """How the compiled kernel decodes a kind. form: a key of ops/cpu/experts.py: FORMS. numbers: further attributes of its call."""

    form: str
    numbers: Mapping[str, int | float] = {}


class PackingKind(Protocol):
    """A module of kinds has `kind(parameters) -> PackingKind`, called with what ExpertConfig.packing has behind a colon.

    published: whether a checkpoint holds its experts so. Such experts are kept as they are; the other kinds lose something and are
    only made when a plan asks for them (Plan.expert_dtype), by `pack`.
    """

    published: bool

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        """What the bytes of an expert hold, in order. The biases of a biased expert are a section of that name, in float32:
        gate's, up's, down's.
        """
        ...

    def decode(self, config: ExpertConfig, parts: Mapping[str, Any], xp: ModuleType) -> Any:
        """The weights [matrices, F, M] in float32, exactly: gate, up, down transposed. parts: arrays of the module xp, numpy or
        jax.numpy, by section.
        """
        ...

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        """How the compiled kernel computes such experts; None: it does not, they are unpacked by XLA."""
        ...


class QuantisingKind(PackingKind, Protocol):
    """A kind that a plan can ask for."""

    def encode(self, config: ExpertConfig, core: np.ndarray) -> dict[str, np.ndarray]:
        """All sections but the biases, of the weights [matrices, F, M] in float32."""
        ...


def border_biases(config: ExpertConfig) -> Section:
    """The section that holds the biases of an expert, empty where it has none."""
    return Section((((config.matrices - 1) * config.hidden + config.model) if config.biased else 0,), np.dtype(np.float32))


def is_plain(config: ExpertConfig) -> bool:
    """Whether an expert is a SwiGLU without biases, the only form that every compiled kernel computes."""
    return config.activation == "swiglu" and not config.biased
