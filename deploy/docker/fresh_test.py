"""The README's two commands, word for word, on a machine that has nothing: ``make fresh-test``.

Goal: what the README promises a stranger is true. Method: a bare Debian container with Python, a C++ compiler
and make, and nothing else; the committed tree in it; an ordinary user without caches; the first block of
commands under the README's heading "Two commands", each run by a shell as it is printed there.

Owns that container. It must not help: what the commands need, they must bring or ask for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from deploy.docker.docker_tools import ROOT, CommandFailed, attempt, bounded, require_engine, run
from deploy.docker.image import base_image

WHOLE_TEST_MAX_S = 2700
PACKAGES = ("python3", "python3-venv", "g++", "make")
HEADING = "## Two commands"
USER = "stranger"
PROJECT = f"/home/{USER}/fieldmesh"


def readme_commands(text: str) -> list[str]:
    """The lines of the first shell block under the heading. Raises ValueError where there is none."""
    block = re.search(rf"^{re.escape(HEADING)}\n.*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = block.group(1).splitlines() if block else []
    if not commands or not all(command.startswith("make ") for command in commands):
        raise ValueError(f'README.md has no block of make commands under "{HEADING}"')
    return commands


def committed_tree() -> bytes:
    """The tree of HEAD as a tar file: nothing that is not committed helps."""
    return subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True, timeout=60
    ).stdout


def in_container(name: str, command: str, *, data: bytes | None = None) -> int:
    """The exit code of a shell command, run as the user in the project's folder; its output is shown."""
    interactive = ["--interactive"] if data is not None else []
    full = ["docker", "exec", *interactive, "--user", USER, "--workdir", PROJECT, name, "sh", "-c", command]
    return subprocess.run(
        full, input=data, stdin=None if data else subprocess.DEVNULL, check=False
    ).returncode


def main() -> int:
    """0 if every command succeeds."""
    require_engine()
    commands = readme_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    if attempt("git", "status", "--porcelain", "--untracked-files=no"):
        print("fresh-test: there are changes that are not committed; what is committed is tested", flush=True)
    image = base_image("fieldmesh-fresh:bookworm", *PACKAGES)
    name = f"fieldmesh-fresh-{os.getpid()}"
    times: list[tuple[str, float, int]] = []
    failure = ""
    try:
        with bounded(WHOLE_TEST_MAX_S, "fresh-test"):
            run(
                "docker",
                "run",
                "--detach",
                "--init",
                "--name",
                name,
                image,
                "sleep",
                str(WHOLE_TEST_MAX_S + 60),
            )
            run("docker", "exec", name, "useradd", "--create-home", "--shell", "/bin/sh", USER)
            run("docker", "exec", "--user", USER, name, "mkdir", PROJECT)
            if in_container(name, "tar -x", data=committed_tree()) != 0:
                raise CommandFailed("the tree could not be put into the container")
            for command in commands:
                print(f"\nfresh-test: $ {command}", flush=True)
                begun = time.monotonic()
                code = in_container(name, command)
                times.append((command, time.monotonic() - begun, code))
                if code != 0:
                    raise CommandFailed(f"{command}: exit code {code}")
    except (CommandFailed, TimeoutError, KeyboardInterrupt) as error:
        failure = str(error) or "interrupted"
    finally:
        attempt("docker", "rm", "--force", "--volumes", name)
    print()
    for command, spent_s, code in times:
        print(f"fresh-test: {spent_s:6.0f} s  exit code {code}  {command}")
    print(f"fresh-test: FAILED: {failure}" if failure else "fresh-test: all as the README says", flush=True)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
