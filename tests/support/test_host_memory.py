"""Free memory within the limits of control groups of both versions, as files say it."""

import pathlib
import re

import numpy as np
import pytest

from specmoe_jax.checkpoints.tensors import aligned_empty
from specmoe_jax.support import host_memory

MIB = 1 << 20
STATUS = pathlib.Path("/proc/self/status")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a system: what is free, the groups of this process, and each group's numbers by folder."""

    def make(free: int, groups: str, files: dict[str, dict[str, str]]) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
        (tmp_path / "groups").write_text(groups)
        for folder, contents in files.items():
            (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (tmp_path / "root" / folder / name).write_text(text)

    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "ROOT", tmp_path / "root")
    return make


def v1(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"inactive_file 7\ntotal_inactive_file {cache // 4}\ntotal_active_file {cache * 3 // 4}\n",
    }


def v2(limit: int | str, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cache // 4}\nactive_file {cache * 3 // 4}\n",
    }


def test_without_groups_it_is_what_the_machine_has_free(system):
    system(800 * MIB, "", {})
    assert host_memory.available_bytes() == 800 * MIB


@pytest.mark.parametrize(
    ("groups", "folder", "of"), [("4:cpu,memory:/a/b\n3:cpuset:/\n", "memory/a/b", v1), ("0::/a/b\n", "a/b", v2)], ids=["v1", "v2"]
)
def test_a_limit_counts_less_what_is_used_and_cannot_be_dropped(system, groups, folder, of):
    system(800 * MIB, groups, {folder: of(500 * MIB, 300 * MIB, cache=100 * MIB)})
    assert host_memory.available_bytes() == 300 * MIB


def test_a_limit_of_a_group_above_counts_too(system):
    system(800 * MIB, "0::/a/b\n", {"a/b": v2("max", 10 * MIB), "a": v2(400 * MIB, 150 * MIB), "": {}})
    assert host_memory.available_bytes() == 250 * MIB


def test_a_container_finds_its_group_at_the_root(system):
    system(800 * MIB, "5:memory:/docker/0123\n", {"memory": v1(200 * MIB, 190 * MIB)})
    assert host_memory.available_bytes() == 10 * MIB


def test_a_group_beyond_its_limit_has_no_room(system):
    system(800 * MIB, "0::/\n", {"": v2(100 * MIB, 120 * MIB)})
    assert host_memory.available_bytes() == 0


def test_version_1_without_a_limit(system):
    system(800 * MIB, "5:memory:/\n", {"memory": v1((1 << 63) - 4096, 190 * MIB)})
    assert host_memory.available_bytes() == 800 * MIB


@pytest.mark.skipif(not STATUS.exists(), reason="Linux tells it")
def test_blocks_of_experts_are_memory_of_the_process_alone():
    """Shared mappings are counted apart: limits of control groups count them, RssAnon does not."""
    before = kinds()
    blocks = [aligned_empty((MIB,), np.dtype(np.uint8)) for _ in range(64)]
    for block in blocks:
        block[:] = 1
    grown = {name: size - before[name] for name, size in kinds().items()}
    assert grown["RssAnon"] > 32 * MIB and grown["RssShmem"] < 8 * MIB  # others of this process take and give meanwhile


def test_freed_memory_can_be_returned():
    host_memory.return_freed()  # nothing of it can be seen everywhere


def kinds() -> dict[str, int]:
    found = re.findall(r"(Rss\w+):\s+(\d+) kB", STATUS.read_text())
    return {name: int(size) << 10 for name, size in found}
