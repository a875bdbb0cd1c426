"""The hardware probe with tiny sizes, and its cache."""

import jax
import pytest

from specmoe_jax.autotune import probe
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.machines import machine
from specmoe_jax.support import progress
from specmoe_jax.support.cache_files import machine_key, read_cached, write_cached


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (
        ("COPIED_BYTES", 1 << 12),
        ("READ_BYTES", 1 << 12),
        ("DISK_BYTES", 1 << 20),
        ("BUDGET_S", 0.0),
        ("CHAIN", 2),
    ):
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(probe, "SIZE", {"cpu": 16, "other": 16})


@pytest.mark.slow
def test_measured_once_a_machine(quick, tmp_path):
    first = probe.probe()
    assert first.measured and first.accelerator_is_cpu and first.disk_bytes_per_s > 0
    assert Hardware.from_json(first.to_json()) == first
    again = probe.probe()
    changing = {"host_memory_bytes": 1.0, "accelerator_memory_bytes": 1.0}  # what is free at the moment
    assert again.replace(**changing) == first.replace(**changing)
    assert probe.probe(fresh=True).up_bytes_per_s != first.up_bytes_per_s
    (file,) = tmp_path.rglob("hardware/*.json")
    file.write_text("{")
    assert probe.probe().measured


def test_kept_for_a_day(monkeypatch, tmp_path):
    """A machine that was measured while it was busy said for ever that runs took 1.6 of what its memory allows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = [machine("4090"), machine("a100")]
    monkeypatch.setattr(probe, "_measure", lambda *_: measured.pop(0))
    clock = [1e9]
    monkeypatch.setattr(probe.time, "time", lambda: clock[0])
    assert probe.probe().up_bytes_per_s == machine("4090").up_bytes_per_s
    clock[0] += probe.KEPT_S - 1
    assert probe.probe().accelerator_bytes_per_s == machine("4090").accelerator_bytes_per_s
    clock[0] += 1
    assert probe.probe().accelerator_bytes_per_s == machine("a100").accelerator_bytes_per_s
    clock[0] -= 10  # the clock was set
    with pytest.raises(IndexError):
        probe.probe()


def test_memory_is_read_beyond_caches_but_within_what_is_free(monkeypatch):
    read = []
    monkeypatch.setattr(probe, "_sum", lambda numbers: read.append(numbers.nbytes))
    monkeypatch.setattr(probe, "BUDGET_S", 0.0)
    monkeypatch.setattr(probe, "_accelerator_memory", lambda device: 8 << 20)
    rate, _ = probe._read_rate(jax.local_devices()[0])
    assert rate > 0 and set(read) == {1 << 20}


@pytest.mark.slow
def test_it_says_how_far_it_is(quick, monkeypatch, capfd):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    probe.probe(progress="log")
    assert "probe: 100%" in capfd.readouterr().err
    probe.probe(progress="log")  # it is known now
    assert not capfd.readouterr().err


def test_the_cache_survives_what_it_cannot_do(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_cached("folder", "key", {"a": 1})
    assert read_cached("folder", "key") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_cached("folder", "key", {"a": 1})
    assert read_cached("folder", "key") == {"a": 1}
    assert machine_key("a") != machine_key("b") and machine_key("a") == machine_key("a")
