"""How many cores this process may use. Owns: reading affinity and the cgroup's cpu limit (v1 and v2), and
where the kernel keeps a process's limits.
"""

from __future__ import annotations

import os
from pathlib import Path


def cpu_budget(root: Path = Path("/")) -> int:
    """Whole cores that threads may keep busy: the smaller of affinity and cgroup limit, at least 1.

    A limit of 1.5 cores gives 1: llama.cpp's threads spin while they wait for each other, so one thread
    too many costs more than one too few. ``root`` is where /proc and /sys are found.
    """
    limits = [float(len(os.sched_getaffinity(0))), *_cgroup_limits(root)]
    return max(1, int(min(limits)))


def _cgroup_limits(root: Path) -> list[float]:
    """Cores allowed by each cgroup on the way up from this process's own."""
    limits: list[float] = []
    for folder in own_groups(root, "cpu"):
        # v2 has one file, which holds "quota period" or "max period"; v1 has two.
        limits += _ratio(*[*read_text(folder / "cpu.max").split(), "", ""][:2])
        limits += _ratio(
            read_text(folder / "cpu.cfs_quota_us").strip(), read_text(folder / "cpu.cfs_period_us").strip()
        )
    return limits


def own_groups(root: Path, controller: str) -> list[Path]:
    """The folders of every cgroup above this process, v2 and v1, in which a controller may set limits."""
    found: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:  # v2: one hierarchy
            found += _upwards(root / "sys/fs/cgroup", group)
        elif controller in controllers.split(","):
            found += _upwards(root / "sys/fs/cgroup" / controller, group)
    return found


def _upwards(mount: Path, group: str) -> list[Path]:
    """The group's folder and all above it (inside a container often only the topmost exists: its own)."""
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _ratio(quota: str, period: str) -> list[float]:
    if not quota.isdigit() or not period.isdigit() or not int(period) or not int(quota):
        return []  # "max", "-1", absent
    return [int(quota) / int(period)]


def read_text(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
