"""A program that takes the flags of `fieldmesh serve` and behaves like a node to those who look: no engine.

Flags of its own come before: --stubborn ignores SIGTERM and a closed stdin, --broken ends with a sentence,
--failed says that its engine was given up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading

from fieldmesh.v1 import inference_pb2 as pb
from tests.client.scripted import ScriptedNode


async def main(options: argparse.Namespace) -> None:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    node = ScriptedNode(name=options.name, port=int(options.listen.rpartition(":")[2]))
    if options.failed:
        node.engine = pb.ENGINE_STATE_FAILED
    # Each peer listener of this mesh is beside its client listener.
    for seed in options.seed:
        port = int(seed.rpartition(":")[2]) - 1
        node.peers.append(ScriptedNode(name=f"peer-{port}", port=port))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, (lambda: None) if options.stubborn else leave.set)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if not options.stubborn:
            loop.call_soon_threadsafe(leave.set)

    threading.Thread(target=watch, daemon=True).start()
    await node.start()
    await leave.wait()
    await node.die()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in ("--stubborn", "--broken", "--failed", "--found", "--end-with-stdin", "--no-mdns"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--name", "--profile", "--listen", "--peer-listen", "--state-folder", "--threads", "--mesh"):
        parser.add_argument(flag)
    for flag in ("--drain-timeout-s", "--advertise", "--metrics-listen", "--http-listen"):
        parser.add_argument(flag)
    parser.add_argument("--seed", action="append", default=[])
    parsed = parser.parse_args()
    if parsed.broken:
        sys.exit("fieldmesh: This node was never going to start. [CONFIG_INVALID]")
    asyncio.run(main(parsed))
