"""What this node has sent: counted until the load report shows it, the request ends, or it moves on."""

from __future__ import annotations

from dataclasses import replace

from mesh_views import GENERAL_OFFER, IDLE, member

from fieldmesh.core.traffic import Traffic, Unreported


def test_requests_that_the_load_report_shows_are_not_counted_twice() -> None:
    before = member("b", GENERAL_OFFER)
    traffic = Traffic()
    traffic.begin("r", before, prompt_tokens=50, max_tokens=100)
    assert traffic.unreported(before).requests == 1
    reported = replace(before, load=replace(IDLE, running=1))
    assert traffic.unreported(reported).requests == 0


def test_requests_that_ended_are_not_counted() -> None:
    b = member("b", GENERAL_OFFER)
    traffic = Traffic()
    traffic.begin("r", b, prompt_tokens=50, max_tokens=100)
    traffic.end("r")
    traffic.end("r")
    assert traffic.unreported(b).requests == 0


def test_a_request_that_moves_to_another_node_leaves_the_first() -> None:
    b, c = member("b", GENERAL_OFFER), member("c", GENERAL_OFFER)
    traffic = Traffic()
    traffic.begin("r", b, prompt_tokens=50, max_tokens=100)
    traffic.begin("r", c, prompt_tokens=50, max_tokens=100)
    assert traffic.unreported(b) == Unreported()
    assert traffic.unreported(c) == Unreported(requests=1, prompt_tokens=50, max_tokens=100)
