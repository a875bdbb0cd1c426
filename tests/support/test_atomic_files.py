"""Files of a run: whole or not at all, through links and open descriptors, and beside a person's own files."""

import os
import sys

import pytest

from specmoe_jax.support import atomic_files
from specmoe_jax.support.atomic_files import check_writable, descriptor_of, write_atomically
from specmoe_jax.support.errors import RequestError


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    target.write_text("old")
    link.symlink_to("there/target")
    check_writable(str(link))
    write_atomically(str(link), "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [file.name for file in target.parent.iterdir()] == ["target"]


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(str(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_an_open_file_is_written_through(tmp_path):
    """As /dev/stdout of a command whose output goes into a file: the link, the file and what is in it all stay."""
    with open(tmp_path / "log", "w") as log:
        log.write("before\n")
        log.flush()
        link = tmp_path / "stdout"
        link.symlink_to(f"/proc/self/fd/{log.fileno()}")
        assert descriptor_of(str(link)) == log.fileno()
        check_writable(str(link))
        write_atomically(str(link), "figures\n")
        os.write(log.fileno(), b"after\n")
    assert link.is_symlink() and (tmp_path / "log").read_text() == "before\nfigures\nafter\n"
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["log", "stdout"]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(RequestError, match="no regular file"):
        check_writable(str(path))


def test_a_file_of_the_users_that_is_named_like_a_temporary_one_is_left_alone(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "out.partial"
    precious.write_text("precious")
    link.symlink_to(precious)
    os.mkfifo(tmp_path / "stats.partial")  # to open it would wait for ever
    for name in ("out", "stats"):
        check_writable(str(tmp_path / name))
        write_atomically(str(tmp_path / name), "new")
        assert (tmp_path / name).read_text() == "new"
    assert link.is_symlink() and precious.read_text() == "precious"
    assert {file.name for file in tmp_path.iterdir()} == {"precious", "out.partial", "stats.partial", "out", "stats"}


def test_links_in_a_circle_and_names_with_a_nul_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (str(tmp_path / "a"), "a\0b"):
        with pytest.raises(RequestError, match="cannot write"):
            check_writable(path)


def test_a_failure_leaves_nothing_beside(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "replace", full)
    with pytest.raises(RequestError, match="No space left"):
        write_atomically(str(tmp_path / "x"), "new")
    assert not list(tmp_path.iterdir())
