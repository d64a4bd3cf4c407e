"""How much memory is left, by the kernel's and by a container's account; where a user keeps things."""

import os
import pwd
from pathlib import Path

import pytest

from pipeline_train import host, selftest_run

GIB = 2**30


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup" / "memory").mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal:  33554432 kB\nMemAvailable:   8388608 kB\nHugePages_Total:  0\n")
    return tmp_path


def test_the_kernels_account(files):
    assert host.available_memory() == 8 * GIB


@pytest.mark.parametrize("names, cache", [
    (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
    (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), "total_inactive_file"),
])  # fmt: skip
def test_a_containers_limit_counts_and_its_file_cache_can_be_taken_back(files, names, cache):
    limit, usage, statistics = (files / "cgroup" / name for name in names)
    limit.write_text("%d\n" % (6 * GIB))
    usage.write_text("%d\n" % (5 * GIB))
    assert host.available_memory() == GIB
    statistics.write_text("anon 5\n%s %d\nactive_file 7\n" % (cache, 2 * GIB))
    assert host.available_memory() == 3 * GIB
    limit.write_text("%d\n" % (100 * GIB))
    assert host.available_memory() == 8 * GIB
    limit.write_text("max\n")  # version 2's word for no limit
    assert host.available_memory() == 8 * GIB


def test_over_the_limit_is_nothing_left(files):
    (files / "cgroup" / "memory.max").write_text("1000\n")
    (files / "cgroup" / "memory.current").write_text("5000\n")
    assert host.available_memory() == 0


def test_where_nothing_says_it_it_is_not_known(files):
    (files / "meminfo").unlink()
    assert host.available_memory() is None


def test_this_machine_has_some():
    assert 2**20 < (host.available_memory() or 2**21) < 2**50


@pytest.mark.parametrize("nbytes, text", [(3 * 2**29, "1.50 GiB"), (2**25, "0.03 GiB"), (3 * 2**19, "1.50 MiB"), (0, "0.00 MiB")])
def test_sizes_are_said_in_a_unit_that_shows_them(nbytes, text):
    assert host.size(nbytes) == text


def nobody(uid):
    raise KeyError(uid)


def test_where_a_users_caches_are(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert host.cache_folder() == Path("/home/x/.cache/pipedock")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert host.cache_folder() == Path("/c/pipedock")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert host.cache_folder() == Path("/c/pipedock")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert host.cache_folder() is None


def test_a_self_test_without_a_home_is_not_recorded_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    said = []
    selftest_run._record({"ok": True, "key": "k"}, said.append)
    assert said == [
        "self-test: passed, but that cannot be recorded: no home folder is known (set HOME or XDG_CACHE_HOME); the next train "
        "tests again"
    ]
    assert selftest_run.recorded("k") is None and os.listdir(str(tmp_path)) == []
