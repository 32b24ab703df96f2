"""Whether a message could come from a correct member. Owns: the shape of messages and their limits.

Must not: look at a node's state. What is shaped well and contradicts the state is the machine's to drop.
"""

from __future__ import annotations

from fieldmesh.core.raft_model import Append, Chunk, EntryKind, Members, Message, RaftConfig


def plausible(message: Message, config: RaftConfig) -> bool:
    """Whether a correct member with these limits could have sent this."""
    body = message.body
    if message.term < 1 or not message.group:
        return False
    if isinstance(body, Append):
        return _plausible_append(body, message.term, config)
    if isinstance(body, Chunk):
        return _plausible_chunk(body, message.term, config)
    return True


def _plausible_chunk(chunk: Chunk, term: int, config: RaftConfig) -> bool:
    within = chunk.offset >= 0 and chunk.offset + len(chunk.data) <= chunk.total_bytes
    advances = bool(chunk.data) or chunk.total_bytes == 0
    known = chunk.index > 0 and 0 < chunk.index_term <= term and bool(chunk.members.voters)
    return within and advances and known and chunk.total_bytes <= config.snapshot_bytes_max


def _plausible_append(append: Append, term: int, config: RaftConfig) -> bool:
    index, newest = append.prev_index, append.prev_term
    if index < 0 or newest > term or len(append.entries) > config.append_entries_max:
        return False
    for entry in append.entries:
        index += 1
        in_order = entry.index == index and max(newest, 1) <= entry.term <= term
        if not in_order or len(entry.data) > config.entry_bytes_max:
            return False
        newest = entry.term
        if entry.kind is EntryKind.MEMBERS and not _decodes(entry.data):
            return False
    return True


def _decodes(data: bytes) -> bool:
    try:
        Members.decode(data)
    except ValueError:
        return False
    return True
