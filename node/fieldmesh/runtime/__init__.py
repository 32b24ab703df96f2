"""The asyncio shell of a node: network, disk, identity, clock, and the composition root."""

from __future__ import annotations

import os

# gRPC's newer event engine hands each small message from thread to thread of a pool of its own. The sockets
# polled in one thread, as gRPC did before, spare an idle node a fifth of its processor time. gRPC reads this
# when its first channel or server is made; a version that knows the names no longer does as it likes.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
