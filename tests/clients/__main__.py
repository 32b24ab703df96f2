"""Other people's clients, unmodified, against a live mesh that does not run in their environment.

    python -m tests.clients SET=ENVIRONMENT …

Starts two nodes, opens the HTTP door of the one that does not own the domain, and runs `tests/clients/SET`
by the Python of each environment. What the suites need to know is in variables; see ``conftest``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cluster import Cluster, free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ALONE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


def main() -> int:
    """The worst exit code of the suites."""
    environments = dict(word.split("=", 1) for word in sys.argv[1:])
    with Cluster() as cluster:
        port = free_port()
        entry = cluster.add("general", "general", extra=("--http-listen", f"127.0.0.1:{port}"))
        owner = cluster.add("code", "code", extra=("--http-listen", "off"))
        for box in (entry, owner):
            cluster.start(box)
        cluster.wait_formed()
        told = {"MESH_HTTP": f"http://127.0.0.1:{port}", "MESH_GRPC": entry.client}
        return max(run(name, Path(folder), told) for name, folder in environments.items())


def run(name: str, environment: Path, told: dict[str, str]) -> int:
    """One suite; its exit code."""
    print(f"=== {name}", flush=True)
    command = [environment / "bin" / "python", "-m", "pytest", "-c", HERE / "pytest.ini", HERE / name]
    variables = {**os.environ, **ALONE, **told}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    return subprocess.run([str(word) for word in command], cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
