"""Dashboards and alerts. Goal: they ask for what nodes tell, by the names that nodes use, and alerts fire
when they should.

Method: every name in the rules and the dashboard is looked up in the list of metrics (which another test
holds against a node's page); promtool runs the rules over series made up for each alert; docker-compose reads
the files.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "observability"
RULES = sorted((FOLDER / "rules").glob("*.yml"))
DASHBOARD = FOLDER / "grafana" / "dashboards" / "fieldmesh.json"
TIME_LIMIT_S = 60

_EXPRESSION = re.compile(r"expr: (?:>-\n)?((?:.+\n?)+?)(?= +(?:for|labels|- record|- alert)|\Z)")
# What Prometheus itself adds to every series.
_SCRAPED = {"instance", "job"}
_SUFFIXES = {
    "counter": ("",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def listed() -> dict[str, set[str]]:
    """Labels by the name of every series that a node shows, from the manual."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "deploy" / "METRICS.md").read_text().splitlines():
        if line.startswith("| `fieldmesh_"):
            name, kind, labels, _ = (cell.strip() for cell in line.strip("|").split("|"))
            for suffix in _SUFFIXES[kind]:
                extra = {"le"} if suffix == "_bucket" else set()
                found[name.strip("`") + suffix] = {*filter(None, labels.split(", ")), *extra} | _SCRAPED
    return found


def recorded() -> set[str]:
    return {name for path in RULES for name in re.findall(r"- record: (\S+)", path.read_text())}


def panels() -> Iterator[dict[str, Any]]:
    yield from json.loads(DASHBOARD.read_text())["panels"]


def expressions() -> list[tuple[str, str]]:
    """Everything that is asked of Prometheus, with where it stands."""
    found = [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())]
    for path in RULES:
        text = re.sub(r"#.*", "", path.read_text())
        found += [(path.name, block) for block in _EXPRESSION.findall(text)]
    return found


def test_every_expression_is_looked_at() -> None:
    rules = sum(path.read_text().count("expr:") for path in RULES)
    assert sum(where.endswith(".yml") for where, _ in expressions()) == rules > 15


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_only_what_nodes_tell_is_asked_for(where: str, expression: str) -> None:
    known, made = listed(), recorded()
    assert len(known) > 30
    names = set(re.findall(r"\bfieldmesh[a-z0-9_:]*", re.sub(r'"[^"]*"', '""', expression)))
    for name in names:
        assert name in made or name in known, f"{where} asks for {name}, which no node tells"
    assert names or re.search(r"\b(up|process_[a-z_]+)\{", expression), where
    # The labels that the expression selects and groups by are labels of what it asks for.
    labels = set(re.findall(r"[{,]\s*([a-z_]+)\s*[!=]~?", expression))
    for group in re.findall(r"by \(([^)]*)\)", expression):
        labels |= {label.strip() for label in group.split(",")}
    if not names & made:
        allowed = set().union(_SCRAPED, *(known[name] for name in names))
        assert labels <= allowed, f"{where} uses {labels - allowed}"


def test_what_is_recorded_is_used() -> None:
    for name in recorded():
        assert sum(name in expression for _, expression in expressions()) > 0, name


def test_every_panel_has_a_place_and_a_word_of_explanation() -> None:
    places: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["type"] == "row" or panel["description"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & places, f"{panel['title']} lies on another"
        places |= cells
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    uids = set(re.findall(r'"uid": "([^"]+)"', DASHBOARD.read_text())) - {"fieldmesh"}
    (provisioned,) = re.findall(
        r"uid: (\S+)", (FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    assert uids == {provisioned}


# --- the rules ---------------------------------------------------------------------------


def promtool(*arguments: str) -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("PROMTOOL IS MISSING: the alerts were not tested (Debian: package prometheus)")
    done = subprocess.run(
        [found, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", *map(str, RULES))
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_is_tested_both_ways() -> None:
    alerts = re.findall(r"- alert: (\S+)", (FOLDER / "rules" / "alerts.yml").read_text())
    tested = (FOLDER / "rules_test.yml").read_text()
    for alert in alerts:
        silent = re.findall(rf"- {{eval_time: \w+, alertname: {alert}}}", tested)
        fires = re.findall(rf"alertname: {alert}\n +exp_alerts:\n", tested)
        assert silent, f"{alert} is never expected to be silent"
        assert fires, f"{alert} is never expected to fire"


# --- the containers ----------------------------------------------------------------------


@pytest.mark.parametrize("command", [("docker-compose",), ("docker", "compose")])
def test_compose_takes_the_files(command: tuple[str, ...]) -> None:
    if (
        shutil.which(command[0]) is None
        or subprocess.run(
            [*command, "version"], capture_output=True, timeout=TIME_LIMIT_S, check=False
        ).returncode
    ):
        pytest.skip(f"{' '.join(command)} IS MISSING: the compose files were not read by it")
    files = ("-f", "docker-compose.yml", "-f", "deploy/observability/compose.yml")
    done = subprocess.run(
        [*command, *files, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FIELDMESH_LISTEN_METRICS: 0.0.0.0:7419") == 3
    # What is published, is on loopback; metrics are not published.
    published = re.findall(r"^ +- (\S+:\d+:\d+)/tcp$", done.stdout, re.MULTILINE)
    assert all(entry.startswith("127.0.0.1:") for entry in published)
    assert not any(entry.endswith(":7419") for entry in published)


def test_what_the_containers_mount_is_there() -> None:
    mounts = re.findall(r"- \./(\S+?):/", (FOLDER / "compose.yml").read_text())
    assert len(mounts) == 4
    for mount in mounts:
        assert (ROOT / mount).exists(), mount


def test_what_is_scraped_are_the_nodes_of_the_compose_file() -> None:
    targets = re.findall(r'"(\w+):7419"', (FOLDER / "prometheus.yml").read_text())
    services = (ROOT / "docker-compose.yml").read_text().partition("services:")[2]
    assert targets == re.findall(r"^  (\w+):\n    <<: \*node", services, re.MULTILINE)
