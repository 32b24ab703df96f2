"""Engines behind their own doors, each in processes of its own: ours, llama.cpp's server, llama_cpp.server.

Owns: starting and ending them, and one way to stream an answer from each. Must not: know what is measured.

llama.cpp's server comes from PyPI's ``xllamacpp``, llama_cpp.server from llama-cpp-python; both speak HTTP
and get a fresh connection for each request, because the former closes idle ones (a load generator that
keeps them alive sees failures that are not the server's). Ours is ``fieldmesh serve``, asked over gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import aiohttp

from benchmarks.cluster import Cluster, free_port, tail
from fieldmesh.client import AsyncClient

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer as its reader saw it. Times are seconds since the request was sent."""

    arrivals_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def step_s(self) -> float:
        """Seconds a token after the first."""
        return (self.duration_s - self.ttft_s) / max(1, self.completion_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


class Server(Protocol):
    """Something that answers over the network."""

    name: str

    async def answer(self, prompt: str, tokens: int) -> Answer:
        """Exactly ``tokens`` greedy tokens after ``prompt``, the end of text ignored."""
        ...


class Ours:
    """One node, or several that share the box, asked over gRPC."""

    name = "fieldmesh"

    def __init__(
        self,
        model: Path,
        *,
        slots: int,
        context_tokens: int,
        threads: int,
        nodes: int = 1,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._cluster = Cluster(threads=threads)
        profile = self._cluster.folder / "bench.toml"
        profile.write_text(
            'name = "bench"\ndescription = "Answers what a benchmark asks."\n'
            f"model = {json.dumps(str(model))}\nslots = {slots}\ncontext_tokens = {context_tokens}\n"
            '[[domains]]\nname = "bench"\ndescription = "What a benchmark asks."\n'
            'examples = ["Benchmark", "Measure this"]\n',
            encoding="utf-8",
        )
        for number in range(nodes):
            self._cluster.add(f"bench-{number}", str(profile), extra=("--queue-max", "256", *extra))
        self._clients: list[AsyncClient] = []
        self._turn = 0

    @property
    def pids(self) -> list[int]:
        """The nodes' processes and their engines'."""
        return [pid for box in self._cluster.boxes.values() for pid in (box.pid, *box.engine_pids())]

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    async def __aenter__(self) -> Self:
        try:
            for box in self._cluster.boxes.values():
                self._cluster.start(box)
            await asyncio.to_thread(self._cluster.wait_formed)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        self._clients = [AsyncClient([box.client]) for box in self._cluster.boxes.values()]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.close()
        await asyncio.to_thread(self._cluster.__exit__, kind, error, trace)

    async def answer(self, prompt: str, tokens: int) -> Answer:
        self._turn += 1
        client = self._clients[self._turn % len(self._clients)]
        answer, begun = Answer(), time.perf_counter()
        stream = client.generate(
            prompt, profile="bench", temperature=0.0, max_tokens=tokens, ignore_eos=True, timeout_s=600
        )
        async for chunk in stream:
            if chunk.token_ids:
                answer.arrivals_s.append(time.perf_counter() - begun)
        result = await stream.result()
        answer.duration_s = time.perf_counter() - begun
        answer.prompt_tokens, answer.completion_tokens = result.prompt_tokens, result.completion_tokens
        answer.cached_tokens = result.cached_tokens
        return answer


class OverHttp:
    """Something that speaks OpenAI's completions at ``url``; enter it before asking.

    A fresh connection for each request unless ``keep_alive`` is set.
    """

    def __init__(self, name: str, url: str, *, keep_alive: bool = False) -> None:
        self.name = name
        self._url = url
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(force_close=not self._keep_alive, limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(self, prompt: str, tokens: int) -> Answer:
        assert self._session is not None
        answer, begun = Answer(), time.perf_counter()
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "logit_bias": {},
        }
        async with self._session.post(f"{self._url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise aiohttp.ClientResponseError(reply.request_info, (), status=reply.status)
            async for event in _events(reply.content):
                choices = event.get("choices")
                if isinstance(choices, list) and choices and choices[0].get("finish_reason") is None:
                    answer.arrivals_s.append(time.perf_counter() - begun)
                _take_usage(answer, event)
        answer.duration_s = time.perf_counter() - begun
        if not answer.completion_tokens:  # llama_cpp.server counts nothing in a stream: an event is a token
            answer.completion_tokens = len(answer.arrivals_s)
        if not answer.arrivals_s:
            answer.arrivals_s.append(answer.duration_s)
        return answer


class Http(OverHttp):
    """A peer in a process of its own."""

    def __init__(self, kind: str, model: Path, *, setting: str = "default", **options: int) -> None:
        port = free_port()
        super().__init__(kind, f"http://127.0.0.1:{port}")
        self.setting = setting
        self._command = [
            sys.executable, "-m", "benchmarks.servers", kind, "--model", str(model),
            "--port", str(port), "--setting", setting,
            *(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(f"/tmp/fieldmesh-bench-{os.getpid()}-{port}.log")

    async def __aenter__(self) -> Self:
        self._start()
        await super().__aenter__()
        over = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                await self.answer("Hello", 1)
                return self
            except (aiohttp.ClientError, OSError):
                if self._process is None or self._process.poll() is not None or time.monotonic() > over:
                    print("\n".join(tail(self._log, 20)), file=sys.stderr)
                    await self.__aexit__(None, None, None)
                    raise RuntimeError(f"{self.name} does not start") from None
                await asyncio.sleep(0.1)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.unlink(missing_ok=True)

    def _start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def _take_usage(answer: Answer, event: Mapping[str, object]) -> None:
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = int(usage["prompt_tokens"])
        answer.completion_tokens = int(usage["completion_tokens"])
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, object]]:
    async for line in content:
        if line.startswith(b"data:") and b"[DONE]" not in line:
            yield json.loads(line[5:])


# --- the peers' processes ----------------------------------------------------------------

SETTINGS = ("default", "no-flash-attention", "unified-kv", "small-batch")
"""What llama.cpp's server is tried with: as it comes, and three settings that may suit a small box better."""


def _llama_cpp(arguments: argparse.Namespace) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.n_parallel = arguments.slots
    params.n_ctx = arguments.context_tokens * arguments.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.port = arguments.port
    match arguments.setting:
        case "no-flash-attention":
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        case "unified-kv":
            params.kv_unified = True
        case "small-batch":
            params.n_batch = params.n_ubatch = 256
    server = xllamacpp.Server(params)
    assert server.listening_address
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # the server's threads are its own; nothing here is worth saving


def _llama_cpp_python(arguments: argparse.Namespace) -> None:
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    model = ModelSettings(
        model=arguments.model,
        n_ctx=arguments.context_tokens,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )
    # By default the server ends a running stream when the next request comes.
    server = ServerSettings(interrupt_requests=False)
    app = create_app(server_settings=server, model_settings=[model])
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


def main() -> None:
    """Run a peer in this process until it is told to end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers")
    parser.add_argument("kind", choices=("llama.cpp", "llama_cpp.server"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="default")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    (_llama_cpp if arguments.kind == "llama.cpp" else _llama_cpp_python)(arguments)


if __name__ == "__main__":
    main()
