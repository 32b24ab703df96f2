"""The engine beside llama.cpp's own server and llama_cpp.server: same model, prompts, lengths and slots.

    python -m benchmarks.engine [--json] [--model GGUF] [--rounds N] [--only NAME …]

All are asked over the network by one load generator, in turn, in several rounds; a row is the median of its
rounds, and its note the spread. Ratios are those of one round, so that what else the machine does hits both.
*Cold* prompts were never seen before, *repeated* ones were asked once before the clock starts. llama.cpp's
server runs with the best of four settings, chosen first, on eight clients, and named in the notes.
Needs PyPI's ``xllamacpp`` and llama-cpp-python's server (``pip install -r requirements/bench.txt``).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import aiohttp

from benchmarks import inside
from benchmarks.report import Row, percentile, show
from benchmarks.servers import SETTINGS, Answer, Http, Ours, Server
from fieldmesh import profiles
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.engine.cores import cpu_budget

SLOTS = 16
CONTEXT_TOKENS = 2048
ANSWER_TOKENS = 64
PROMPT_WORDS = 90
_WORDS = """
amber anchor apple arch autumn barn basin beacon birch bridge brook candle canyon cedar chalk cliff
clock cloud coast copper coral cotton crane creek dawn delta desert drift dune eagle ember falcon fern
field flint forest frost garden glacier grain granite harbor harvest hazel heron hollow island ivory
jasmine kettle lagoon lantern laurel linen maple marble meadow mill mist mountain nectar oak ocean olive
orchard otter pebble pepper pine prairie quarry raven reed ridge river saddle sage sail salmon sand
shore silver slate snow spruce stone storm stream summit thistle thunder timber trail tulip valley
velvet walnut wheat willow winter wolf
"""
WORDS = tuple(_WORDS.split())


def words(rng: Random, count: int) -> str:
    """A prompt that nobody has seen; a word is about a token and a quarter."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


@dataclass(slots=True, kw_only=True)
class Burst:
    """What several clients saw, each asking one question after another."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(a.completion_tokens for a in self.answers) / self.seconds

    def ttft_s(self, percent: float) -> float:
        return percentile([a.ttft_s for a in self.answers], percent)

    def gap_s(self, percent: float) -> float:
        return percentile([gap for a in self.answers for gap in a.gaps_s], percent)


async def burst(server: Server, prompts: Sequence[str], clients: int, tokens: int = ANSWER_TOKENS) -> Burst:
    """Ask all prompts from so many clients at once. Raises RuntimeError for an answer of another length."""
    waiting, seen = list(reversed(prompts)), Burst()

    async def client() -> None:
        while waiting:
            seen.answers.append(await server.answer(waiting.pop(), tokens))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seen.seconds = time.perf_counter() - begun
    wrong = [a.completion_tokens for a in seen.answers if a.completion_tokens != tokens]
    if wrong and server.name != "llama_cpp.server":  # it ends at the end of the text whatever it is told
        raise RuntimeError(f"{server.name} answered {wrong[0]} tokens where {tokens} were asked for")
    return seen


# --- rounds side by side -----------------------------------------------------------------

Values = dict[str, float]
"""Measure to value, of one server in one round."""


@dataclass(slots=True, kw_only=True)
class Pair:
    """The rounds of one measure."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [o / p for o, p in zip(self.ours, self.peer, strict=True)]


async def side_by_side(
    ours: Server, peer: Server, rounds: int, run: Callable[[Server, Random], Awaitable[Values]]
) -> dict[str, Pair]:
    """Both do the same, in turn; who begins changes from round to round."""
    pairs: dict[str, Pair] = {}
    for number in range(rounds):
        order = (ours, peer) if number % 2 == 0 else (peer, ours)
        for server in order:
            for measure, value in (await run(server, Random(number))).items():
                pair = pairs.setdefault(measure, Pair())
                (pair.ours if server is ours else pair.peer).append(value)
    return pairs


def rows_of(pairs: dict[str, Pair], unit: str, aims: dict[str, float], peer: str, *, more: bool) -> list[Row]:
    """A row a measure whose ``ours`` is a ratio, because that is what the aim is about."""
    rows = []
    for measure, pair in pairs.items():
        ratios = sorted(pair.ratios)
        rows.append(
            Row(
                measure=measure,
                unit=f"ratio of {unit}",
                ours=statistics.median(ratios),
                aim=aims.get(measure.removesuffix("_repeated")),
                higher_is_better=more,
                note=f"{statistics.median(pair.ours):.4g} against {statistics.median(pair.peer):.4g} {unit} "
                f"({peer}); ratios {ratios[0]:.2f} to {ratios[-1]:.2f}",
            )
        )
    return rows


# --- the measures ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured with: the model, the number of rounds, the peer's best setting."""

    model: Path
    rounds: int
    threads: int
    setting: str = "default"

    def ours(self, *, nodes: int = 1, threads: int = 0, extra: tuple[str, ...] = ()) -> Ours:
        return Ours(
            self.model,
            slots=SLOTS,
            context_tokens=CONTEXT_TOKENS,
            threads=threads or self.threads,
            nodes=nodes,
            extra=extra,
        )

    def peer(self, kind: str = "llama.cpp", setting: str = "") -> Http:
        return Http(
            kind,
            self.model,
            setting=setting or self.setting,
            slots=SLOTS,
            context_tokens=CONTEXT_TOKENS,
            threads=self.threads,
        )

    @asynccontextmanager
    async def both(self) -> AsyncIterator[tuple[Ours, Http]]:
        async with self.ours() as ours, self.peer() as peer:
            yield ours, peer


async def best_setting(bench: Bench) -> str:
    """The peer's setting with the most tokens a second at eight clients, cold."""
    speeds = {}
    for setting in SETTINGS:
        async with bench.peer(setting=setting) as peer:
            rng = Random(7)
            seen = await burst(peer, [words(rng, PROMPT_WORDS) for _ in range(16)], 8)
            speeds[setting] = seen.tokens_per_s
            print(f"  llama.cpp's server, {setting}: {seen.tokens_per_s:.0f} tokens/s", file=sys.stderr)
    return max(speeds, key=lambda setting: speeds[setting])


async def loads(bench: Bench) -> list[Row]:
    """Throughput and first tokens at four loads, cold and repeated."""
    rows = []
    async with bench.both() as (ours, peer):
        for clients in (1, 4, 8, 16):
            asks = clients * 2 if clients == 16 else max(6, 3 * clients)

            async def run(server: Server, rng: Random, clients: int = clients, asks: int = asks) -> Values:
                prompts = [words(rng, PROMPT_WORDS) for _ in range(asks)]
                cold = await burst(server, prompts, clients)
                repeated = await burst(server, prompts, clients)
                values = {}
                for suffix, seen in (("", cold), ("_repeated", repeated)):
                    values[f"tokens_per_s_{clients}{suffix}"] = seen.tokens_per_s
                    if clients in (1, 8):
                        values[f"ttft_p50_{clients}{suffix}"] = seen.ttft_s(50)
                        values[f"ttft_p95_{clients}{suffix}"] = seen.ttft_s(95)
                return values

            pairs = await side_by_side(ours, peer, bench.rounds, run)
            speeds = {m: p for m, p in pairs.items() if m.startswith("tokens")}
            firsts = {m: p for m, p in pairs.items() if m.startswith("ttft")}
            about = f"llama.cpp, {bench.setting}"
            rows += rows_of(speeds, "tokens/s", dict.fromkeys(speeds, 1.0), about, more=True)
            rows += rows_of(firsts, "s", dict.fromkeys(firsts, 1.0), about, more=False)
    return rows


async def shared(bench: Bench) -> list[Row]:
    """Sixteen clients arrive cold with one shared system prompt of about 600 tokens."""

    async def run(server: Server, rng: Random) -> Values:
        system = words(rng, 480)
        prompts = [f"{system}\nQuestion: {words(rng, 12)}\nAnswer:" for _ in range(24)]
        seen = await burst(server, prompts, 16, 48)
        return {
            "shared_prompt_tokens_per_s": seen.tokens_per_s,
            "shared_prompt_ttft_p50": seen.ttft_s(50),
            "shared_prompt_itl_p99": seen.gap_s(99),
        }

    async with bench.both() as (ours, peer):
        pairs = await side_by_side(ours, peer, bench.rounds, run)
    speed = {m: p for m, p in pairs.items() if m.endswith("per_s")}
    times = {m: p for m, p in pairs.items() if m not in speed}
    about = f"llama.cpp, {bench.setting}"
    return [
        *rows_of(speed, "tokens/s", {"shared_prompt_tokens_per_s": 2.0}, about, more=True),
        *rows_of(
            times, "s", {"shared_prompt_ttft_p50": 0.4, "shared_prompt_itl_p99": 0.3}, about, more=False
        ),
    ]


async def under_prefill(bench: Bench) -> list[Row]:
    """The gaps of four running streams while a prompt of about 1,500 tokens is computed."""

    async def timed(server: Server, prompt: str, tokens: int) -> tuple[float, Answer]:
        begun = time.perf_counter()
        return begun, await server.answer(prompt, tokens)

    async def run(server: Server, rng: Random) -> Values:
        streams = [asyncio.create_task(timed(server, words(rng, 20), 192)) for _ in range(4)]
        await asyncio.sleep(1.0)  # all four stream by then
        came, long = await timed(server, words(rng, 1200), 8)
        gaps = [
            late - early
            for begun, answer in await asyncio.gather(*streams)
            for early, late in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)
            if begun + late > came and begun + early < came + long.ttft_s
        ]
        return {"itl_p99_under_prefill": percentile(gaps, 99)}

    async with bench.both() as (ours, peer):
        pairs = await side_by_side(ours, peer, bench.rounds, run)
    return rows_of(pairs, "s", {"itl_p99_under_prefill": 0.5}, f"llama.cpp, {bench.setting}", more=False)


async def packaged(bench: Bench) -> list[Row]:
    """Eight clients beside the server that llama-cpp-python brings."""

    measure = "tokens_per_s_8_vs_llama_cpp_server"

    async def run(server: Server, rng: Random) -> Values:
        prompts = [words(rng, PROMPT_WORDS) for _ in range(8)]
        cold, repeated = await burst(server, prompts, 8), await burst(server, prompts, 8)
        return {measure: cold.tokens_per_s, f"{measure}_repeated": repeated.tokens_per_s}

    async with bench.ours() as ours, bench.peer("llama_cpp.server", "default") as peer:
        pairs = await side_by_side(ours, peer, bench.rounds, run)
    return rows_of(pairs, "tokens/s", {measure: 3.0}, "llama_cpp.server", more=True)


async def cached_prompt(bench: Bench) -> list[Row]:
    """What a cached system prompt of 500 tokens costs the first token, in steps of one token."""
    extra = []
    async with bench.ours() as ours:
        rng = Random(1)
        system = words(rng, 400)
        await ours.answer(f"{system}\n{words(rng, 50)}", 4)
        for _ in range(bench.rounds * 4):
            behind = await ours.answer(f"{system}\n{words(rng, 50)}", 24)
            alone = await ours.answer(words(rng, 50), 24)
            extra.append((behind.ttft_s - alone.ttft_s) / alone.step_s)
    return [
        Row(
            measure="cached_prompt_ttft_extra_steps",
            unit="steps",
            ours=statistics.median(extra),
            aim=1.5,
            note=f"{min(extra):.2f} to {max(extra):.2f}",
        )
    ]


async def three_nodes(bench: Bench) -> list[Row]:
    """Three nodes that share the box together, against one with all of its cores and eight sequences."""
    together, alone = [], []
    cores = max(1, bench.threads // 3)
    async with bench.ours(nodes=3, threads=cores) as three, bench.ours() as one:
        for number in range(bench.rounds):
            prompts = [words(Random(number), 20) for _ in range(18)]
            together.append((await burst(three, prompts, 9, 96)).tokens_per_s)
            alone.append((await burst(one, prompts[:16], 8, 96)).tokens_per_s)
    ratios = [t / a for t, a in zip(together, alone, strict=True)]
    return [
        Row(
            measure="three_nodes_ratio",
            unit="ratio of tokens/s",
            ours=statistics.median(ratios),
            aim=0.7,
            higher_is_better=True,
            note=f"{statistics.median(together):.0f} against {statistics.median(alone):.0f} tokens/s",
        )
    ]


def alone(
    measure: Callable[[Path, int, int], Awaitable[list[Row]]],
) -> Callable[[Bench], Awaitable[list[Row]]]:
    """A measure that needs no server."""
    return lambda bench: measure(bench.model, bench.rounds, bench.threads)


MEASURES: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "loads": loads,
    "shared": shared,
    "under_prefill": under_prefill,
    "packaged": packaged,
    "cached_prompt": cached_prompt,
    "three_nodes": three_nodes,
    "prompt_lookup": alone(inside.prompt_lookup),
    "step_overhead": alone(inside.step_overhead),
    "state_move": alone(inside.state_move),
    "state_stall": alone(inside.state_stall),
    "cold_start": alone(inside.cold_start),
}
BESIDE_LLAMA_CPP = {"loads", "shared", "under_prefill"}


async def measure(arguments: argparse.Namespace) -> list[Row]:
    wanted = arguments.only or list(MEASURES)
    bench = Bench(model=arguments.model, rounds=arguments.rounds, threads=cpu_budget())
    if BESIDE_LLAMA_CPP & set(wanted):
        print("choosing the peer's setting …", file=sys.stderr)
        bench = Bench(
            model=bench.model, rounds=bench.rounds, threads=bench.threads, setting=await best_setting(bench)
        )
    rows: list[Row] = []
    for name in wanted:
        print(f"measuring {name} …", file=sys.stderr)
        try:
            rows += await MEASURES[name](bench)
        except (
            RuntimeError,
            OSError,
            aiohttp.ClientError,
            FieldmeshError,
        ) as error:  # the others still count
            print(f"{name} could not be measured: {error}", file=sys.stderr)
            rows.append(Row(measure=name, unit="not measured", ours=math.nan, aim=0.0, note=str(error)))
    return rows


def main() -> int:
    """Measure, print, and say by the exit status whether every aim was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows to standard output")
    parser.add_argument("--model", type=Path, default=None, help="GGUF file (default: the built-in model)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds a measure (default: 5)")
    parser.add_argument("--only", nargs="*", choices=[*MEASURES], help="measure these alone")
    arguments = parser.parse_args()
    arguments.model = arguments.model or profiles.builtin_model()
    return show(asyncio.run(measure(arguments)), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
