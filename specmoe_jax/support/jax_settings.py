"""JAX's settings that the library needs, without a change of the ones that a program has of its own."""

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import jax

from specmoe_jax.support.cache_files import cache_folder

T = TypeVar("T")
_config: Any = jax.config  # its settings are made when JAX is imported, so that no type knows them
_of_thread = threading.local()


def use_compile_cache() -> None:
    """Keeps compiled programs between runs: a second start compiles nothing (1.3 s -> 0.07 s a program on CPU).

    A program that has chosen a folder, or JAX_ENABLE_COMPILATION_CACHE=false, keeps that.
    """
    if _config.jax_compilation_cache_dir is not None or not _config.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Programs that debug with jax_numpy_rank_promotion or a transfer guard mean their own code: the library's is let through.

    Also a decorator. Copies between two devices stay guarded: the library makes them explicitly.
    """
    with contextlib.ExitStack() as settings:
        if _config.jax_numpy_rank_promotion != "allow":
            settings.enter_context(jax.numpy_rank_promotion("allow"))
        if _guarded(_config.jax_transfer_guard_host_to_device):
            settings.enter_context(jax.transfer_guard_host_to_device("allow"))
        if _guarded(_config.jax_transfer_guard_device_to_host):
            settings.enter_context(jax.transfer_guard_device_to_host("allow"))
        yield


def lenient_thread() -> None:
    """`lenient` for the whole life of a worker thread: its initializer."""
    _of_thread.settings = contextlib.ExitStack()
    _of_thread.settings.enter_context(lenient())


def leniently(values: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same generator, each of whose steps is `lenient`; what its caller does between them is not."""
    try:
        while True:
            with lenient():
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value
    finally:
        with lenient():
            values.close()


def _guarded(level: str | None) -> bool:
    return level not in (None, "allow")
