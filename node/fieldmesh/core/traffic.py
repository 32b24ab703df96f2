"""What this node has sent. Owns: its own requests that load reports do not show yet, and whose turn it is.

Must not: choose where requests go (``routing`` does), or know what others send.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldmesh.core.model import Load, Member, NodeId

UNREPORTED_REQUESTS_MAX = 65_536
LAST_SENT_NODES_MAX = 4096


@dataclass(frozen=True, slots=True)
class _Sent:
    load: Load
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Unreported:
    """Work that this node sent to another and that the other's load report cannot include yet."""

    requests: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0


_NOTHING = Unreported()


class Traffic:
    """This node's own requests that load reports do not show yet, and whose turn it is.

    A request counts as unreported until its node's load differs from the one that it was sent on. The host
    calls ``begin`` when it hands a request to a node and ``end`` when that attempt is over.
    """

    def __init__(self) -> None:
        self._sent: dict[NodeId, dict[str, _Sent]] = {}
        self._where: dict[str, NodeId] = {}
        self._last_sent: dict[NodeId, int] = {}
        self._turn = 0

    def begin(self, key: str, member: Member, *, prompt_tokens: int, max_tokens: int) -> None:
        """Request ``key`` goes to a node (from where it was before, if it was anywhere)."""
        self.end(key)
        node = member.id
        self._turn += 1
        self._last_sent.pop(node, None)
        self._last_sent[node] = self._turn
        if len(self._last_sent) > LAST_SENT_NODES_MAX:
            del self._last_sent[next(iter(self._last_sent))]
        if len(self._where) < UNREPORTED_REQUESTS_MAX:
            self._where[key] = node
            self._sent.setdefault(node, {})[key] = _Sent(member.load, prompt_tokens, max_tokens)

    def end(self, key: str) -> None:
        """Request ``key`` is no longer with a node; unknown keys are ignored."""
        node = self._where.pop(key, None)
        if node is not None:
            at_node = self._sent[node]
            del at_node[key]
            if not at_node:
                del self._sent[node]

    def unreported(self, member: Member) -> Unreported:
        """What this node sent there that the load in ``member`` cannot show."""
        at_node = self._sent.get(member.id)
        if at_node is None:
            return _NOTHING
        for key in [key for key, sent in at_node.items() if sent.load != member.load]:
            self.end(key)
        waiting = at_node.values()
        return Unreported(
            len(waiting), sum(s.prompt_tokens for s in waiting), sum(s.max_tokens for s in waiting)
        )

    def last_sent(self, node: NodeId) -> int:
        """Turn of the last request sent there; 0 for never."""
        return self._last_sent.get(node, 0)

    def __repr__(self) -> str:
        return f"Traffic({ {node: len(sent) for node, sent in self._sent.items()} })"
