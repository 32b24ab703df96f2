"""`ask`, `chat` and `embed`. Owns: questions in, answers out, and who served them."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.core.errors import ConfigError, FieldmeshError, InvalidRequest, PromptTooLong
from fieldmesh.core.model import Message

if TYPE_CHECKING:
    from fieldmesh.client import Choice, Client, Result, Stream
    from fieldmesh.core.model import TokenLogprob

DEFAULT_NODE: Final = "127.0.0.1:7420"
QUESTION_BYTES_MAX: Final = 1_048_576
SCHEMA_BYTES_MAX: Final = 65_536
TRACE_CHARS_SHOWN: Final = 8

Node = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="HOST:PORT",
        envvar="FIELDMESH_NODE",
        help=f"Node to ask; again for others to fall back on. [default: {DEFAULT_NODE}]",
        show_envvar=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Domain = Annotated[str | None, typer.Option(help="Wish: whose domain the question is of.")]
Profile = Annotated[str | None, typer.Option(help="Demand: the profile that must answer.")]
Model = Annotated[str | None, typer.Option(help="Demand: the model that must answer.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, max=131_072, help="Tokens of the answer at most.")]
Seed = Annotated[int | None, typer.Option(min=0, max=4_294_967_295, help="Seed of the draws.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=5, help="0 is greedy.")]
TimeoutS = Annotated[float | None, typer.Option(help="Seconds for the whole answer.")]


def connect(node: list[str] | None) -> Client:
    """A client for the nodes that were named, or the one on this box. Raises ConfigError."""
    from fieldmesh.client import Client
    from fieldmesh.config import CLIENT_PORT
    from fieldmesh.values import address

    named = [part for entry in node or [] for part in entry.split(",") if part]
    return Client(
        [address(part, default_port=CLIENT_PORT, field_name="--node") for part in named or [DEFAULT_NODE]]
    )


def ask(
    question: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    node: Node = None,
    domain: Domain = None,
    profile: Profile = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    temperature: Temperature = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show who could have answered, and why.")
    ] = False,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Schema that the answer must satisfy.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the answer must match.")] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Whether a thinking model reasons first (on stderr)."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, max=16, help="Answers to make.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Tell how likely each token and so many others were."),
    ] = None,
    timeout_s: TimeoutS = None,
    as_json: Json = False,
) -> None:
    """Ask one question. The answer goes to stdout as it comes, who served it to stderr."""
    text = _from_stdin() if question == "-" else question
    options = given(
        domain=domain,
        profile=profile,
        model=model,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        explain=explain or None,
        json_schema=_schema(json_schema) if json_schema else None,
        regex=regex,
        enable_thinking=think,
        n=n,
        logprobs=logprobs,
        timeout_s=timeout_s,
    )
    with connect(node) as client, client.chat(text, **options) as stream:
        try:
            if as_json:
                terminal.write_json(result_json(stream.result()))
            elif n is not None and n > 1:
                show_choices(stream.result())
            else:
                stream_answer(stream)
        except FieldmeshError as error:
            if "trace_id" in error.metadata:  # it got as far as being worked on
                terminal.say(f"Its way: fieldmesh trace {stream.trace_id[:TRACE_CHARS_SHOWN]}")
            raise


def given(**options: Any) -> Any:
    """The options that were set."""
    return {name: value for name, value in options.items() if value is not None}


def _schema(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(SCHEMA_BYTES_MAX + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The schema {path} cannot be read: {error}", field="--json-schema") from error
    if len(data) > SCHEMA_BYTES_MAX:
        raise InvalidRequest(
            f"The schema {path} is larger than {SCHEMA_BYTES_MAX} bytes.", field="--json-schema"
        )
    return text


def _from_stdin() -> str:
    data = sys.stdin.buffer.read(QUESTION_BYTES_MAX + 1)
    if len(data) > QUESTION_BYTES_MAX:
        raise InvalidRequest(
            f"The question on stdin is larger than {QUESTION_BYTES_MAX} bytes.", field="prompt"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("The question on stdin is not UTF-8 text.", field="prompt") from error


def stream_answer(stream: Stream) -> Result:
    """Write the answer as it comes, then who served it."""
    ends_line, reasons = True, False
    try:
        for chunk in stream:
            if chunk.reasoning:
                terminal.murmur(chunk.reasoning)
                reasons = True
            if chunk.text:
                if reasons:
                    terminal.murmur("\n\n")
                    reasons = False
                ends_line = chunk.text.endswith("\n")
                terminal.write(chunk.text)
    finally:
        if not ends_line:
            terminal.write("\n")
    result = stream.result()
    show_logprobs(result.choices[0])
    terminal.say(served_by(result))
    if result.explanation is not None:
        show_explanation(result)
    return result


def show_choices(result: Result) -> None:
    """Several answers, one after the other, each under its number."""
    for choice in result.choices:
        terminal.say(f"answer {choice.index + 1} of {len(result.choices)} (seed {choice.seed})")
        terminal.write(choice.text if choice.text.endswith("\n") else choice.text + "\n")
        show_logprobs(choice)
    terminal.say(served_by(result))


def show_logprobs(choice: Choice) -> None:
    """How likely each token was, on stderr, where that was asked for."""
    if not choice.logprobs:
        return

    def said(entry: TokenLogprob) -> str:
        return f"{entry.piece.decode(errors='replace')!r} {math.exp(entry.logprob):.1%}"

    shown = terminal.table("token", "others at its place")
    for entry in choice.logprobs:
        others = [said(other) for other in entry.top if other.token_id != entry.drawn.token_id]
        terminal.add_row(shown, said(entry.drawn), ", ".join(others))
    terminal.console(stderr=True).print(shown)


def served_by(result: Result) -> str:
    """One line that says who answered, and how fast."""
    way = "" if result.served_by == result.entry_node else f", asked through {result.entry_node}"
    why = f", domain {result.domain}" if result.domain else ""
    fallback = " (a generalist: the domain's owners are not there)" if result.fallback else ""
    failed = [attempt for attempt in result.attempts if attempt.reason != "served"]
    retried = f" · {len(failed)} other tried first" if failed else ""
    seconds = max(result.duration_s - result.ttft_s, 0.0)
    speed = (result.completion_tokens - 1) / seconds if seconds > 0 and result.completion_tokens > 1 else 0.0
    pace = f" at {speed:.0f}/s" if speed else ""
    traced = f" · trace {result.trace_id[:TRACE_CHARS_SHOWN]}" if result.trace_id else ""
    return (
        f"served by {result.served_by} (profile {result.profile}{why}){fallback}{way}{retried} · "
        f"{result.completion_tokens} tokens{pace}, first after {result.ttft_s:.2f} s{traced}"
    )


def show_explanation(result: Result) -> None:
    """The candidates of the routing decision, best first, on stderr."""
    explanation = result.explanation
    assert explanation is not None
    guess = (
        f", classified as {explanation.classified_domain} ({explanation.classified_confidence:.0%})"
        if explanation.classified_domain
        else ""
    )
    shown = terminal.table(
        "node", "profile", "score", "could answer", "why", title=f"policy {explanation.policy}{guess}"
    )
    for note in explanation.candidates:
        score = f"{note.score:.3f}"
        terminal.add_row(
            shown, note.node_name, note.profile, score, "yes" if note.eligible else "no", note.reason
        )
    terminal.console(stderr=True).print(shown)


def result_json(result: Result) -> dict[str, Any]:
    """The result as `--json` prints it."""
    from fieldmesh.client import as_json

    made: dict[str, Any] = as_json(result)
    if made["explanation"] is None:
        del made["explanation"]
    return made


def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts; - reads one from stdin.")],
    node: Node = None,
    domain: Domain = None,
    profile: Profile = None,
    model: Model = None,
    timeout_s: TimeoutS = None,
    as_json: Json = False,
) -> None:
    """Turn texts into vectors of length 1, one line of JSON for each."""
    from fieldmesh.client import as_json as plain

    inputs = [_from_stdin() if text == "-" else text for text in texts]
    options = given(domain=domain, profile=profile, model=model, timeout_s=timeout_s)
    with connect(node) as client:
        made = client.embed(inputs, **options)
    if as_json:
        terminal.write_json(plain(made))
        return
    for vector in made.vectors:
        terminal.write(json.dumps(vector) + "\n")
    terminal.say(f"served by {made.served_by} (profile {made.profile}) · {made.prompt_tokens} tokens")


# --- chat --------------------------------------------------------------------------------

HELP: Final = (
    "/domain NAME · /profile NAME (empty: let the mesh choose) · /reset forgets the talk · /exit, Ctrl-D"
)


def chat(
    node: Node = None,
    domain: Domain = None,
    profile: Profile = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    temperature: Temperature = None,
) -> None:
    """Talk with the mesh. Ctrl-C stops an answer, Ctrl-D ends the talk."""
    options = given(
        domain=domain, profile=profile, model=model, max_tokens=max_tokens, seed=seed, temperature=temperature
    )
    with connect(node) as client:
        client.nodes()  # says at once if nobody is there
        talk(client, options)


def talk(client: Client, options: dict[str, Any]) -> None:
    """The conversation: lines from stdin until its end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input)

        terminal.say(f"Ask anything. {HELP}")
    turns: list[Message] = []
    failures: deque[FieldmeshError] = deque(maxlen=1)
    while True:
        try:
            line = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if failures and not sys.stdin.isatty():  # a script must learn of it
                raise typer.Exit(terminal.exit_code(failures[-1])) from None
            return
        except UnicodeDecodeError as error:
            raise InvalidRequest("The line on stdin is not UTF-8 text.", field="prompt") from error
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            _command(line, options, turns)
        elif line:
            turns.append(Message(role="user", content=line))
            answer = _turn(client, turns, options, failures)
            if answer:
                turns.append(Message(role="assistant", content=answer))
            else:
                turns.pop()


def _command(line: str, options: dict[str, Any], turns: list[Message]) -> None:
    name, _, value = line[1:].partition(" ")
    match name:
        case "domain" | "profile":
            options.pop(name, None)
            if value.strip():
                options[name] = value.strip()
            terminal.say(f"{name}: {options.get(name, 'up to the mesh')}")
        case "reset":
            turns.clear()
            terminal.say("Forgotten.")
        case _:
            terminal.say(HELP)


def _turn(
    client: Client, turns: list[Message], options: dict[str, Any], failures: deque[FieldmeshError]
) -> str:
    """The answer to the talk so far, whose beginning is forgotten when it is too long; "" for none."""
    while True:
        with client.chat(turns, **options) as stream:
            try:
                return stream_answer(stream).text
            except KeyboardInterrupt:
                terminal.say("stopped")
                return stream.text
            except PromptTooLong as error:
                if len(turns) < 3:
                    terminal.complain(error.message)
                    return ""
                del turns[:2]
                terminal.say("The talk has outgrown the model's context: its beginning is forgotten.")
            except ConfigError:
                raise
            except FieldmeshError as error:
                terminal.complain(terminal.sentence(error))
                failures.append(error)
                return ""
