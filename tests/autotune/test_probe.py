"""The hardware probe with tiny sizes, and its cache."""

import pytest

from specmoe_jax.autotune import probe
from specmoe_jax.planner.hardware import Hardware
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
