"""The stored tensors by the names that a family gives them."""

import logging
from collections.abc import Callable, Iterable

from specmoe_jax.checkpoints.files import INDEX_FILE, PADDING_PREFIX, SINGLE_FILE, Checkpoint, StoredTensor
from specmoe_jax.checkpoints.header import quote_list
from specmoe_jax.models.published.published_names import BUFFERS, HEAD
from specmoe_jax.models.spec import TensorSpec
from specmoe_jax.support.errors import CheckpointError

_log = logging.getLogger(__name__)


class Names:
    """The tensors by canonical name, and which of them have been asked for.

    canonical: a stored name -> the specs' name of it, None for what is not used on purpose.
    """

    def __init__(self, checkpoint: Checkpoint, *, canonical: Callable[[str], str | None] = str):
        self._file = file_named(checkpoint)
        used = {name: own for name in checkpoint.tensors if (own := canonical(name)) is not None}
        self.left_out = tuple(name for name in checkpoint.tensors if name not in used and not name.endswith(BUFFERS))
        if len(used) < len(checkpoint.tensors):
            _log.debug("%s: not used on purpose: %s", self._file, quote_list(sorted(set(checkpoint.tensors) - set(used)), 1 << 20))
        self._tensors = {own: checkpoint.tensors[name] for name, own in used.items()}
        self._missing: dict[str, None] = {}  # an ordered set
        self._unused = {name for name in self._tensors if not name.startswith(PADDING_PREFIX)}
        if len(self._tensors) < len(used):
            twice = [name for name, own in used.items() if own != name and own in used]
            raise CheckpointError(f"{self._file}: tensor {quote_list(twice)}: stored under two names; expected one")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def type_of(self, name: str) -> str:
        """Of a tensor that is there, as its header names it."""
        return self._tensors[name].entry.dtype

    def holds(self, spec: TensorSpec) -> bool:
        """Whether there is a tensor of this name and shape."""
        return self.has(spec.name) and self._tensors[spec.name].entry.shape == spec.shape

    def take(self, spec: TensorSpec, *, types: tuple[str, ...] = ()) -> StoredTensor | None:
        """The tensor of a spec; None, and remembered as missing, when there is none. Raises for a wrong shape or dtype.

        types: those that are expected, as a header names them; () for floating-point numbers.
        """
        if spec.name not in self._tensors:
            self._missing[spec.name] = None
            return None
        self._unused.discard(spec.name)
        tensor = self._tensors[spec.name]
        if tensor.entry.shape != spec.shape and not tensor.entry.size == spec.size == 1:  # one number, with an axis or without
            hint = ": it is transposed" if tensor.entry.shape == spec.shape[::-1] else ""
            raise CheckpointError(
                f"{tensor.where}: shape is {list(tensor.entry.shape)}; config.json asks for {list(spec.shape)}{hint}"
            )
        if not types:
            assert tensor.form or tensor.dtype  # raises CheckpointError for integers
        elif tensor.entry.dtype not in types:
            raise CheckpointError(f"{tensor.where}: dtype is {tensor.entry.dtype}; expected one of {', '.join(types)}")
        return tensor

    def take_all(self, specs: Iterable[TensorSpec], *, types: tuple[str, ...] = ()) -> dict[str, StoredTensor]:
        """By name the tensors of those specs that have one; the others are remembered as missing."""
        taken = {spec.name: self.take(spec, types=types) for spec in specs}
        return {name: tensor for name, tensor in taken.items() if tensor is not None}

    def raise_if_missing(self) -> None:
        if self._missing:
            count = len(self._missing)
            headless = list(self._missing) == [HEAD]
            hint = ": was it saved from the base class, and the output matrix left out?" if headless else ""
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} missing that config.json asks for:"
                f" {quote_list(list(self._missing))}{hint}"
            )

    def raise_if_unused(self) -> None:
        if self._unused:
            count = len(self._unused)
            raise CheckpointError(
                f"{self._file}: {count} tensor{'s' * (count > 1)} that this model does not use: {quote_list(sorted(self._unused))}"
            )


def file_named(checkpoint: Checkpoint) -> str:
    """The file to name for what concerns all tensors."""
    return INDEX_FILE if [f.name for f in checkpoint.files] not in ([SINGLE_FILE], []) else SINGLE_FILE
