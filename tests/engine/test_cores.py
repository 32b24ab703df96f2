"""Goal: threads never exceed what the box or container allows. Method: made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fieldmesh.engine.cores import cpu_budget


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_without_a_limit_affinity_decides(root: Path) -> None:
    assert cpu_budget(root) == 8


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8), ("", 8)],
)
def test_cgroup_v2_limits_are_read(root: Path, quota: str, cores: int) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/cpu.max", quota)
    assert cpu_budget(root) == cores


def test_the_tightest_of_nested_v2_groups_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/system.slice/node.service\n")
    write(root, "sys/fs/cgroup/system.slice/cpu.max", "300000 100000")
    write(root, "sys/fs/cgroup/system.slice/node.service/cpu.max", "max 100000")
    assert cpu_budget(root) == 3


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("-1", 8)])
def test_cgroup_v1_limits_are_read(root: Path, quota: str, cores: int) -> None:
    write(root, "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert cpu_budget(root) == cores


def test_the_budget_of_this_machine_is_at_least_one() -> None:
    assert cpu_budget() >= 1
