"""The images that the tests with containers run: where a base comes from, and how the node's image is built.

Owns the choice between a registry and Debian's packages. It must not know what the images are tested for.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploy.docker.docker_tools import ROOT, attempt, run

IMAGE = "fieldmesh:compose-test"
BASE_DEFAULT = "python:3.11-slim-bookworm"
PULL_TIMEOUT_S = 180.0
BASE_TIMEOUT_S = 900.0
BUILD_TIMEOUT_S = 1500.0  # where the engine is compiled in the image; a minute and a half where it is not
WHEELS = ROOT / "build" / "wheels"
LOCAL_WHEELS = ROOT / "deploy" / "docker" / "local" / "wheels"


def base_image(tag: str, *packages: str, default: str | None = None) -> str:
    """An image to start from: ``MESH_BASE`` if set, ``default`` if it is here or a registry hands it out,
    else one of ``packages`` from Debian's own packages, made under ``tag``."""
    if wanted := os.environ.get("MESH_BASE"):
        return wanted
    if default is not None:
        here = attempt("docker", "image", "inspect", default, timeout_s=20)
        if here is not None or attempt("docker", "pull", "--quiet", default, timeout_s=PULL_TIMEOUT_S):
            return default
        print(f"  no registry hands out {default}", flush=True)
    script = str(Path(__file__).with_name("base-from-debian.sh"))
    run(script, tag, *packages, timeout_s=BASE_TIMEOUT_S, shown=True)
    return tag


def build_image() -> None:
    """Builds the image, with the engine that is compiled already if ``make wheel`` has packed one."""
    base = base_image(
        "fieldmesh-base:bookworm", "python3", "python3-venv", "ca-certificates", default=BASE_DEFAULT
    )
    wheels = sorted(WHEELS.glob("llama_cpp_python-*.whl")) if WHEELS.is_dir() else []
    lent = LOCAL_WHEELS / wheels[-1].name if wheels else None
    if lent is not None and not lent.exists():
        lent.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(wheels[-1], lent)
    else:
        lent = None
    file = str(ROOT / "deploy" / "docker" / "Dockerfile")
    build = ("docker", "build", "--quiet", "-f", file, "--build-arg", f"BASE={base}")
    try:
        # The first stage gets a tag, so that the next build finds its layers; what lost its tag goes.
        run(*build, "--target", "build", "-t", f"{IMAGE}-build", str(ROOT), timeout_s=BUILD_TIMEOUT_S)
        run(*build, "-t", IMAGE, str(ROOT), timeout_s=BUILD_TIMEOUT_S)
        own = "label=org.opencontainers.image.title=Fieldmesh"
        run("docker", "image", "prune", "--force", "--filter", own)
    finally:
        if lent is not None:
            lent.unlink()  # or the next image would silently be made for this box's processor
