"""How gRPC polls a node's sockets: what is asked of it must be something that the pinned version knows."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import asyncio
import fieldmesh.runtime
import grpc.aio

async def main():
    server = grpc.aio.server()
    await server.start()
    await server.stop(None)

asyncio.run(main())
"""


def said_by_grpc(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return process.stderr


def test_the_pinned_grpc_knows_the_way_of_polling_that_is_asked_of_it() -> None:
    assert said_by_grpc() == ""


def test_what_a_user_asks_of_grpc_comes_first() -> None:
    assert "Unknown experiment: nonsense" in said_by_grpc(GRPC_EXPERIMENTS="nonsense")
