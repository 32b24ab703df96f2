"""The HTTP door: what it adds to gRPC, how it stands beside llama.cpp's server, and how many it can hold.

    python -m benchmarks.door [--json] [--rounds N] [--only NAME …]

Real nodes with the built-in model, asked for text completions. HTTP and gRPC are asked in turn at one node,
and so are we and llama.cpp's server, both over HTTP by one load generator. A node that was started with the
1,024 open files of a shell is asked while it holds idle connections. Needs ``make bench``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

from benchmarks.cluster import free_port
from benchmarks.engine import PROMPT_WORDS, Bench, Values, best_setting, burst, rows_of, side_by_side, words
from benchmarks.report import Row, percentile, show
from benchmarks.servers import OverHttp, Server
from fieldmesh import profiles
from fieldmesh.core.model import Chunk
from fieldmesh.engine.cores import cpu_budget
from fieldmesh.rpc.openai_answers import Answer

PROMPT = "Say something about bread."
ASKS = 60
FRAMES = 50_000
STREAMS = 8
IDLE_CONNECTIONS = 2000
OPENED_AT_ONCE = 100
SHELL_FILES = 1024
HEALTH = b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n"


@asynccontextmanager
async def one_node(bench: Bench) -> AsyncIterator[tuple[Server, str]]:
    """A node: over gRPC, and where its HTTP door is."""
    port = free_port()
    async with bench.ours(extra=("--http-listen", f"127.0.0.1:{port}")) as ours:
        yield ours, f"http://127.0.0.1:{port}"


async def beside_grpc(bench: Bench) -> list[Row]:
    """The same node by both of its doors, on warm connections."""

    async def speed(server: Server, rng: Random) -> Values:
        own = Random(f"{rng.random()} {server.name}")  # one node: what the first asked, it would have ready
        seen = await burst(server, [words(own, 20) for _ in range(2 * STREAMS)], STREAMS)
        return {f"http_tokens_ratio_{STREAMS}": seen.tokens_per_s}

    async with AsyncExitStack() as stack:
        grpc, url = await stack.enter_async_context(one_node(bench))
        http = await stack.enter_async_context(OverHttp("HTTP", url, keep_alive=True))
        ttft_s: dict[Server, list[float]] = {grpc: [], http: []}
        for server in ttft_s:  # connections and the prompt's prefix are warm
            await server.answer(PROMPT, 8)
        for _ in range(ASKS):
            for server, seen in ttft_s.items():
                seen.append((await server.answer(PROMPT, 2)).ttft_s)
        pairs = await side_by_side(http, grpc, bench.rounds, speed)
    http_ms, grpc_ms = (statistics.median(ttft_s[server]) * 1000 for server in (http, grpc))
    aims = dict.fromkeys(pairs, 0.97)
    return [
        Row(
            measure="http_ttft_added_ms",
            unit="ms",
            ours=http_ms - grpc_ms,
            aim=3.0,
            note=f"{http_ms:.4g} against {grpc_ms:.4g} ms (gRPC), medians of {ASKS}",
        ),
        *rows_of(pairs, "tokens/s", aims, "gRPC", more=True),
    ]


async def beside_llama_cpp(bench: Bench) -> list[Row]:
    """Eight clients with prompts that were never seen, a fresh connection each."""

    async def speed(server: Server, rng: Random) -> Values:
        seen = await burst(server, [words(rng, PROMPT_WORDS) for _ in range(2 * STREAMS)], STREAMS)
        return {f"http_tokens_per_s_{STREAMS}": seen.tokens_per_s}

    setting = await best_setting(bench)
    async with AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(one_node(bench))
        ours = await stack.enter_async_context(OverHttp("fieldmesh", url))
        peer = await stack.enter_async_context(bench.peer(setting=setting))
        pairs = await side_by_side(ours, peer, bench.rounds, speed)
    return rows_of(pairs, "tokens/s", dict.fromkeys(pairs, 1.0), f"llama.cpp, {setting}", more=True)


async def frames(_: Bench) -> list[Row]:
    """Processor time of one event of a stream, beside making all of its JSON anew."""
    chunk = Chunk(generation_id="g", epoch=1, first_token_index=3, token_ids=(7,), text=" bread")
    answer = Answer(chat=True, answer_id=f"chatcmpl-{32 * '0'}", model="m", created=1, include_usage=True)
    answer.event(chunk)
    whole = json.loads(answer.event(chunk).removeprefix(b"data: "))

    def anew() -> bytes:
        whole["choices"][0]["delta"]["content"] = chunk.text
        return b"data: " + json.dumps(whole).encode() + b"\n\n"

    def us(make: Callable[[], bytes]) -> float:
        begun = time.process_time()
        for _ in range(FRAMES):
            make()
        return (time.process_time() - begun) / FRAMES * 1e6

    return [
        Row(
            measure="http_frame_us",
            unit="µs",
            ours=us(lambda: answer.event(chunk)),
            peer="json.dumps of it all",
            peer_value=us(anew),
        )
    ]


# --- connections that say nothing --------------------------------------------------------

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def idle_connections(bench: Bench) -> list[Row]:
    """How long answers take while many have a connection open and ask nothing."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(SHELL_FILES, most), most))
    held: list[Connection] = []
    async with AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(one_node(bench))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        asked = await stack.enter_async_context(OverHttp("fieldmesh", url))
        quiet = await durations_s(asked)
        port = int(url.rpartition(":")[2])
        try:
            while len(held) < IDLE_CONNECTIONS:
                held += await asyncio.gather(*(opened(port) for _ in range(OPENED_AT_ONCE)))
            crowded = await durations_s(asked)
            alive = sum(await asyncio.gather(*(healthy(connection) for connection in held)))
        finally:
            for _, writer in held:
                writer.transport.abort()
    quiet_ms, crowded_ms = (percentile(seen, 95) * 1000 for seen in (quiet, crowded))
    return [
        Row(
            measure="http_idle_connections_held",
            unit="connections",
            ours=float(alive),
            aim=float(IDLE_CONNECTIONS),
            higher_is_better=True,
            note="answered at the end",
        ),
        Row(
            measure="http_p95_ratio_beside_idle_connections",
            unit="ratio of ms",
            ours=crowded_ms / quiet_ms,
            aim=2.0,
            note=f"{crowded_ms:.4g} against {quiet_ms:.4g} ms for answers of 8 tokens",
        ),
    ]


async def durations_s(server: Server) -> list[float]:
    return [(await server.answer(PROMPT, 8)).duration_s for _ in range(ASKS)]


async def opened(port: int) -> Connection:
    """A connection that has been answered once."""
    connection = await asyncio.open_connection("127.0.0.1", port)
    if not await healthy(connection):
        raise RuntimeError("a connection was not answered")
    return connection


async def healthy(connection: Connection) -> bool:
    """Whether a request on it is answered."""
    reader, writer = connection
    writer.write(HEALTH)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
    except (OSError, EOFError):
        return False
    return head.startswith(b"HTTP/1.1 200 ")


MEASURES: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "frames": frames,
    "beside_grpc": beside_grpc,
    "beside_llama_cpp": beside_llama_cpp,
    "idle_connections": idle_connections,
}


async def measure(bench: Bench, wanted: list[str]) -> list[Row]:
    rows: list[Row] = []
    for name in wanted:
        print(f"measuring {name} …", file=sys.stderr)
        found = await MEASURES[name](bench)
        for row in found:
            print(f"  {row.measure}: {row.ours:.4g} {row.unit} {row.note}", file=sys.stderr)
        rows += found
    return rows


def main() -> int:
    """Measure, print, and say by the exit status whether every aim was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.door", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows to standard output")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of what is compared (default: 7)")
    parser.add_argument("--only", nargs="*", choices=[*MEASURES], help="measure these alone")
    arguments = parser.parse_args()
    bench = Bench(model=profiles.builtin_model(), rounds=arguments.rounds, threads=cpu_budget())
    rows = asyncio.run(measure(bench, arguments.only or list(MEASURES)))
    return show(rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
