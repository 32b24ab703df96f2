"""The mesh as the web page is told: one node's view as JSON, and what changed since it was last told.

Owns: which facts leave, their names and units, and how finely numbers are told (what trembles below that is
no change). Prompts, answers and the ids by which a request can be aborted stay here. Must not: perform I/O,
decide, or know HTTP.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fieldmesh.core.model import Address, Attempt, Explanation, Member, MeshView, NodeId

NODES: Final = "nodes"

Snapshot = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One request that this node knows of: it entered here, or ``entry`` sent it here.

    ``key`` names it to the page and to nobody else. ``state`` is waiting, running, done or failed, the last
    with the ``code`` of its error. ``attempts`` are those that ended; ``explanation`` is there where it was
    asked for.
    """

    key: str
    entry: NodeId
    serving: NodeId | None
    profile: str
    state: str
    domain: str = ""
    fallback: bool = False
    attempts: tuple[Attempt, ...] = ()
    tokens: int = 0
    code: str = ""
    duration_s: float = 0.0
    explanation: Explanation | None = None


def snapshot(
    view: MeshView, *, mesh: str, models: Sequence[str], log: dict[str, Any], flows: Sequence[Flow]
) -> Snapshot:
    """Everything that the page draws. ``models`` may be asked for, ``log`` is ``rpc.admin.status_json``."""
    return {
        "mesh": mesh,
        "local": view.local,
        "models": models,
        NODES: {member.id: _node(member, local=member.id == view.local) for member in view.members},
        "log": _log(log),
        "requests": [_request(flow) for flow in flows],
    }


def changes(before: Snapshot, now: Snapshot) -> dict[str, Any]:
    """What ``now`` says differently: whole values by their names; of the nodes those that changed, None for
    one that has gone."""
    found = {name: value for name, value in now.items() if name != NODES and before.get(name) != value}
    old, new = before.get(NODES, {}), now[NODES]
    nodes: dict[str, Any] = {name: node for name, node in new.items() if old.get(name) != node}
    nodes.update(dict.fromkeys(old.keys() - new.keys()))
    return {**found, NODES: nodes} if nodes else found


def reasons(flow: Flow) -> dict[str, Any]:
    """Why a request went where it went."""
    why = flow.explanation
    return {
        **_request(flow),
        "attempts": [
            {
                "node": attempt.node,
                "name": attempt.node_name,
                "reason": attempt.reason,
                "tokens": attempt.last_token_index - attempt.first_token_index,
            }
            for attempt in flow.attempts
        ],
        "policy": why.policy if why else "",
        "classified_domain": why.classified_domain if why else "",
        "classified_confidence": round(why.classified_confidence, 3) if why else 0.0,
        "candidates": [
            {
                "node": note.node,
                "name": note.node_name,
                "profile": note.profile,
                "score": round(note.score, 3),
                "eligible": note.eligible,
                "reason": note.reason,
            }
            for note in (why.candidates if why else ())
        ],
    }


def _request(flow: Flow) -> dict[str, Any]:
    return {
        "key": flow.key,
        "entry": flow.entry,
        "serving": flow.serving,
        "profile": flow.profile,
        "domain": flow.domain,
        "fallback": flow.fallback,
        "attempts": len(flow.attempts),
        "tokens": flow.tokens,
        "state": flow.state,
        "code": flow.code,
        "duration_s": round(flow.duration_s, 2),
    }


def _node(member: Member, *, local: bool) -> dict[str, Any]:
    load, row = member.load, member.row
    return {
        "name": member.name,
        "state": member.state.value,
        "engine": "draining" if load.draining else load.engine.value,
        "running": load.running,
        "slots": load.slots,
        "queued": load.queued,
        "queue_max": load.queue_max,
        "kv_pressure": round(load.kv_pressure, 2),
        "decode_tokens_per_s": round(load.decode_tokens_per_s),
        "rtt_ms": round(member.rtt_s * 2000) / 2,
        "version": row.version if row else "",
        "profiles": [
            {
                "name": offer.name,
                "model": offer.model,
                "domains": [domain.name for domain in offer.domains],
                "tier": offer.tier,
                "context_tokens": offer.context_tokens,
            }
            for offer in (row.profiles if row else ())
        ],
        "pages": _pages(member, local=local),
    }


def _pages(member: Member, *, local: bool) -> list[str]:
    """Where the node's own page is. A loopback address means another box to every other box."""
    same_box = local or _is_loopback(member.address)
    found = member.row.http_addresses if member.row else ()
    return [f"http://{address}/" for address in found if same_box or not _is_loopback(address)]


def _is_loopback(address: Address) -> bool:
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"


def _log(status: dict[str, Any]) -> dict[str, Any]:
    """The log's part: its age in whole seconds, and no names of others' logs."""
    stale_s = status["stale_s"]
    return {
        "role": status["role"],
        "term": status["term"],
        "leader": status["leader"],
        "members": status["members"],
        "revision": status["revision"],
        "lag_entries": status["lag_entries"],
        "stale_s": None if stale_s is None else int(stale_s),
        "stopped": status["stopped"],
    }
