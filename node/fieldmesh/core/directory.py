"""What a node may say that it offers. Owns: which rows are acceptable.

Functions over rows; no state. Must not: know how rows travel (``replica``) or who is alive.
"""

from __future__ import annotations

from typing import Protocol

from fieldmesh.core.messages import ADDRESSES_MAX, NAME_CHARACTERS_MAX, Envelope
from fieldmesh.core.model import Row

PROFILES_MAX = 32
DOMAINS_PER_PROFILE_MAX = 64


class RowCodec(Protocol):
    """Turns a row into the payload of an envelope and back (``rpc.wire`` is one)."""

    def encode_row(self, row: Row) -> bytes: ...

    def decode_row(self, data: bytes) -> Row | None:
        """None for what is not a row."""
        ...


def open_row(envelope: Envelope, codec: RowCodec, mesh: str) -> Row | None:
    """The row in an envelope, or None where its author may not say this: a row speaks of its author, in
    this mesh, under the incarnation and sequence that were signed, and within the bounds."""
    row = codec.decode_row(envelope.payload)
    if row is None or row.mesh != mesh or row.id != envelope.author:
        return None
    if (row.incarnation, row.sequence) != (envelope.incarnation, envelope.sequence):
        return None
    return None if problem(row) else row


def problem(row: Row) -> str:
    """What is wrong with a row, as a sentence; empty where nothing is."""
    if not 1 <= len(row.name) <= NAME_CHARACTERS_MAX:
        return f"name: 1 to {NAME_CHARACTERS_MAX} characters are accepted"
    if max(map(len, (row.addresses, row.client_addresses, row.http_addresses))) > ADDRESSES_MAX:
        return f"addresses: at most {ADDRESSES_MAX} are accepted"
    if len(row.profiles) > PROFILES_MAX:
        return f"profiles: at most {PROFILES_MAX} are accepted"
    if row.seat is not None and not 1 <= len(row.seat.log) <= NAME_CHARACTERS_MAX:
        return f"seat: a log's name has 1 to {NAME_CHARACTERS_MAX} characters"
    for profile in row.profiles:
        if len(profile.domains) > DOMAINS_PER_PROFILE_MAX:
            return f"profile {profile.name}: at most {DOMAINS_PER_PROFILE_MAX} domains are accepted"
    return ""
