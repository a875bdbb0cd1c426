"""pytorch_model-*.bin: where their tensors lie, asked of torch, which runs nothing of what the files hold; for conversions.

torch lists the tensors of a file without reading their data; the data lies in it as in a safetensors file, so that the same
readers take it, a few rows at a time.
"""

import math
import pathlib
import pickle

from specmoe_jax.checkpoints.files import Checkpoint, StoredTensor, read_index, regular_file_bytes
from specmoe_jax.checkpoints.header import Entry, quote
from specmoe_jax.support.errors import CheckpointError, RequestError

TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def has_torch_files(path: pathlib.Path) -> bool:
    """Whether a directory holds weights as torch saves them."""
    return (path / TORCH_FILE).exists() or (path / TORCH_INDEX).exists()


def open_torch_checkpoint(path: pathlib.Path) -> Checkpoint:
    """The tensors of a directory with pytorch_model*.bin; no data is read. Raises CheckpointError; RequestError without torch."""
    shards, tensors = [TORCH_FILE], {}
    if (path / TORCH_INDEX).exists():
        shards = sorted(set(read_index(path / TORCH_INDEX, suffix=".bin").values()))
    for shard in shards:
        for name, entry in _entries(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor {quote(name)}: also in {tensors[name].path.name}; expected once")
            tensors[name] = StoredTensor(path / shard, entry)
    return Checkpoint(path=path, tensors=tensors, metadata={})


def _entries(file: pathlib.Path) -> dict[str, Entry]:
    """Names, types, shapes and places of a file's tensors."""
    try:
        import torch
    except ImportError:
        raise RequestError(f"{file.name}: reading torch's files needs torch; install it: pip install specmoe_jax[torch]") from None
    size = regular_file_bytes(file)
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file.name}: holds more than tensors (torch refuses it with weights_only), or is damaged") from None
    except Exception as e:  # whatever else a damaged file makes of the reader
        reason = quote(" ".join(str(e).split()), spaces=True)
        raise CheckpointError(f"{file.name}: torch cannot read it ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file.name}: holds other things than named tensors; expected a model's state_dict")
    return {name: _entry(str(name), tensor, size, file.name) for name, tensor in tensors.items()}


def _entry(name: str, tensor, file_bytes: int, file: str) -> Entry:
    where, dtype = f"{file}: tensor {quote(name)}", str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {dtype}; expected one of {', '.join(DTYPES)}")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{where}: not stored in order; save it with torch once more, after .contiguous()")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{where}: this torch does not say where it lies; upgrade it: pip install specmoe_jax[torch]")
    start += tensor.storage_offset() * tensor.element_size()
    end = start + math.prod(tensor.shape) * tensor.element_size()
    if end > file_bytes:
        raise CheckpointError(f"{where}: ends at byte {end}, the file has {file_bytes}: is the download complete?")
    return Entry(name=name, dtype=DTYPES[dtype], shape=tuple(tensor.shape), start=start, end=end)
