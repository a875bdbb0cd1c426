"""Names such as org/name: the local Hugging Face cache first, which needs no network; then a download, where one may be made."""

import os
import pathlib
import re

from specmoe_jax.support.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "README.md")
NO_NETWORK = {  # exceptions of huggingface_hub and of what it asks with
    "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip
EXTRA_FOLDERS = ("original/", "metal/", "onnx/", "openvino/", "consolidated")  # the weights once more, in other forms


def is_name(name: str) -> bool:
    """Whether a text may be the name of a repository."""
    return NAME.fullmatch(name) is not None


def cache_folder() -> pathlib.Path:
    """Where the libraries of Hugging Face keep what they downloaded: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return pathlib.Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return pathlib.Path(home).expanduser() / "hub"


def cached(name: str) -> pathlib.Path | None:
    """The snapshot of a repository in the local cache: that of the main branch, or else the only one; None without."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        found = sorted((folder / "snapshots").glob("*"))
        snapshot = found[0] if len(found) == 1 else None
    return snapshot if snapshot is not None and (snapshot / "config.json").exists() else None


def download(name: str) -> pathlib.Path:
    """A repository, downloaded into the cache with bars; a download that was stopped goes on. Raises CheckpointError."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"model {name}: not in {cache_folder()}, and HF_HUB_OFFLINE forbids a download; unset it")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"model {name}: no such directory, and not in {cache_folder()}; pip install specmoe_jax[hub] lets it be downloaded"
        ) from None
    try:
        files = [file.rfilename for file in huggingface_hub.HfApi().model_info(name).siblings]
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SIDE_FILES, *weight_files(files)]))
    except Exception as e:  # whatever a network, a disk or a server does
        raise CheckpointError(f"model {name}: no such directory, and its download failed: {_reason(name, e)}") from None


def weight_files(files: list[str]) -> list[str]:
    """Those of a repository's files that hold the weights, once: safetensors where there are any."""
    files = [file for file in files if not file.startswith(EXTRA_FOLDERS)]
    safetensors = [file for file in files if file.endswith(".safetensors")]
    return safetensors or [file for file in files if re.fullmatch(r"pytorch_model.*\.bin", file)]


def _reason(name: str, error: Exception) -> str:
    """What went wrong and what to do. The kinds are told by name: their classes moved between releases."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"its licence has to be accepted at https://huggingface.co/{name} first, then: hf auth login"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private; check the name, or: hf auth login"
    if kinds & NO_NETWORK:
        return f"no network reaches huggingface.co; where there is one: hf download {name}, then copy the folder and give its path"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}; the same command goes on where it stopped"
