"""A pycrdt document behind rules of our own: rows, marks, deltas, compaction. The only importer of pycrdt.

Owns: one document with one plain map, one key a node, each value the bytes of a signed envelope. The
document only transports rows. What counts is ``rows``, kept outside it: for each author the envelope
with the highest (incarnation, sequence) that was ever seen, so neither a conflict (won by the larger
client id, not by the later writer) nor a vandal's write can set an author back.
Must not: know what a payload means, who is alive, or when to talk to whom.

Rules, each learned from a failure of the library (tests/core/test_replica.py has one test for each):
a fresh client id at every boot; values are copied to bytes; keys are sorted on read; nested types are
never entered; whatever the library raises, a panic included, is caught here and the document rebuilt;
an answer that would be too large is cut into pages of whole clients, and a compacted document is
written under many client ids so that it can be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from zlib import crc32

from pycrdt import Doc, Map

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.messages import (
    ROW_BYTES_MAX,
    STATE_VECTOR_BYTES_MAX,
    UPDATE_BYTES_MAX,
    DirectoryPull,
    DirectoryPush,
    Envelope,
    Mark,
    Sealer,
)
from fieldmesh.core.model import NodeId

CLIENT_ID_BITS = 53
EPOCH_MAX = 2**52
SNAPSHOT_MAGIC = b"fieldmesh-directory-1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """Bounds. ``page_bytes_max`` leaves room for the frame around an update.

    ``document_bytes_max`` is what a document may grow to by others' writes before it is rebuilt;
    ``compact_at_bytes`` and ``compact_at_ratio`` (to the live rows) say when it is worth an epoch.
    ``repair_after_s``: how long a damaged row waits for its owner before anybody who holds a good one
    writes it back; ``own_repair_interval_s`` bounds how often the owner does (two copies of one key would
    overwrite each other for ever). A copy to rebuild from is taken once a ``good_copy_interval_s``.
    """

    rows_max: int = 2048
    page_bytes_max: int = UPDATE_BYTES_MAX - 1024
    document_bytes_max: int = 64 * 1024 * 1024
    compact_at_bytes: int = 64 * 1024
    compact_at_ratio: float = 3.0
    compact_chunk_bytes: int = 64 * 1024
    repair_after_s: float = 5.0
    own_repair_interval_s: float = 0.5
    good_copy_interval_s: float = 1.0
    adopt_interval_s: float = 1.0

    def __post_init__(self) -> None:
        if self.page_bytes_max > UPDATE_BYTES_MAX:
            raise ValueError(f"page_bytes_max must be at most {UPDATE_BYTES_MAX}, got {self.page_bytes_max}")
        if self.compact_at_ratio <= 1.0:
            raise ValueError(f"compact_at_ratio must be above 1, got {self.compact_at_ratio}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The best row of one author: its sealed bytes and what they open to."""

    sealed: bytes
    envelope: Envelope

    @property
    def stamp(self) -> tuple[int, int]:
        return (self.envelope.incarnation, self.envelope.sequence)


class Replica:
    """One node's copy of the directory. Methods return what changed; nothing here sends or waits."""

    def __init__(
        self,
        local: NodeId,
        sealer: Sealer,
        rng: Random,
        *,
        incarnation: int,
        config: ReplicaConfig | None = None,
        snapshot: bytes | None = None,
    ) -> None:
        """Raises nothing for a damaged snapshot: ``snapshot_damaged`` tells."""
        self.config = config or ReplicaConfig()
        self.epoch = 0
        self.rejected = 0
        """Remote nonsense survived: updates refused, rows that did not open."""
        self.rebuilds = 0
        self.snapshot_damaged = False
        self.own_incarnation_seen = incarnation
        """The highest incarnation under which this node's own key was seen to sign a row."""
        self._local = local
        self._sealer = sealer
        self._rng = rng
        self._incarnation = incarnation
        self._sequence = 0
        self._rows: dict[NodeId, Held] = {}
        self._raw: dict[str, bytes] = {}
        """The document's values as they were when last read."""
        self._damaged_since: dict[NodeId, float] = {}
        self._adopted_at = self._own_repaired_at = self._good_at = float("-inf")
        self._mark: Mark | None = None
        self._good: bytes | None = None
        self._document, self._map = self._fresh_document()
        if snapshot is not None:
            self._restore(snapshot)

    def __repr__(self) -> str:
        return f"Replica(epoch={self.epoch}, rows={len(self._rows)}, bytes={self.document_bytes})"

    # --- reading ---------------------------------------------------------------------------

    @property
    def rows(self) -> Mapping[NodeId, Held]:
        """The best row of every author; iterate it sorted where order matters."""
        return MappingProxyType(self._rows)

    @property
    def mark(self) -> Mark:
        """Equal on two replicas exactly when their documents hold equal values."""
        if self._mark is None:
            digest = blake2b(digest_size=8)
            for key in sorted(self._raw):
                digest.update(key.encode() + b"\0" + blake2b(self._raw[key], digest_size=8).digest())
            self._mark = Mark(epoch=self.epoch, digest=digest.digest())
        return self._mark

    @property
    def document_bytes(self) -> int:
        return len(self._document.get_update())

    @property
    def live_bytes(self) -> int:
        return sum(len(raw) + len(key) for key, raw in self._raw.items())

    # --- writing one's own row -------------------------------------------------------------

    @property
    def next_sequence(self) -> int:
        """The sequence that the next published row is signed under."""
        return self._sequence + 1

    def raise_incarnation(self, incarnation: int) -> None:
        """Sign under a higher incarnation from the next ``publish`` on."""
        if incarnation <= self._incarnation:
            raise ValueError(f"incarnation must rise above {self._incarnation}, got {incarnation}")
        self._incarnation = incarnation
        self.own_incarnation_seen = max(self.own_incarnation_seen, incarnation)

    def publish(self, payload: bytes) -> None:
        """Say something new of oneself.

        Raises InvalidRequest where the signed row exceeds ``ROW_BYTES_MAX``.
        """
        sealed = self._sealer.seal(self._incarnation, self._sequence + 1, payload)
        if len(sealed) > ROW_BYTES_MAX:
            raise InvalidRequest(
                f"this node's directory row has {len(sealed)} bytes; at most {ROW_BYTES_MAX} are accepted: "
                "shorten the profiles' descriptions and examples",
                field="profiles",
            )
        self._sequence += 1
        envelope = Envelope(
            author=self._local, incarnation=self._incarnation, sequence=self._sequence, payload=payload
        )
        self._rows[self._local] = Held(sealed=sealed, envelope=envelope)
        self._write(self._local)

    # --- anti-entropy ----------------------------------------------------------------------

    def pull(self, after_client: int = 0) -> DirectoryPull:
        """The question that brings this replica up to date."""
        state = self._document.get_state()
        if len(state) > STATE_VECTOR_BYTES_MAX:  # too many clients to name: ask for everything
            state = b"\0"
        return DirectoryPull(epoch=self.epoch, state_vector=state, after_client=after_client)

    def answer(self, pull: DirectoryPull) -> DirectoryPush | None:
        """What the asker lacks, in pages of whole clients; None where this replica can tell nothing.

        An asker of an older epoch gets the document from the beginning.
        """
        if pull.epoch > self.epoch:
            return None
        theirs = decode_state_vector(pull.state_vector) if pull.epoch == self.epoch else {}
        ours = decode_state_vector(self._document.get_state())
        if theirs is None or ours is None:
            self.rejected += 1
            return None
        lacking = sorted(
            client
            for client, clock in ours.items()
            if client > pull.after_client and theirs.get(client, 0) < clock
        )
        page = len(lacking)
        while True:
            claimed = dict(ours)
            for client in lacking[:page]:
                claimed[client] = min(theirs.get(client, 0), ours[client])
            update = self._encode(claimed)
            if update is None:
                return None
            if len(update) <= self.config.page_bytes_max:
                break
            if page <= 1:  # one client alone is too much: step over it, compaction will cut it up
                self.rejected += 1
                update, page = b"", max(page, 1)
                break
            page //= 2
        following = lacking[page - 1] if 0 < page < len(lacking) else 0
        return DirectoryPush(epoch=self.epoch, update=update, next_client=following)

    def apply(self, push: DirectoryPush, now: float) -> tuple[NodeId, ...]:
        """Take a peer's update in; returns the authors whose best row changed, sorted.

        A key that vanished takes no row away: ``drop`` alone does, when the node here judges it time.
        """
        if len(push.update) > UPDATE_BYTES_MAX or not 0 <= push.epoch <= EPOCH_MAX:
            self.rejected += 1
            return ()
        if push.epoch < self.epoch or not push.update:
            return ()
        if push.epoch > self.epoch and not self._adopt(push.epoch, now):
            return ()
        self._apply_guarded(push.update, now)
        changed = self._read(now)
        self._mend(now)
        return changed

    def tick(self, now: float) -> None:
        """Write back rows that stayed damaged for too long."""
        self._mend(now)

    def drop(self, author: NodeId) -> None:
        """Forget a node that has been gone for long, here and, through the document, everywhere."""
        self._rows.pop(author, None)
        self._damaged_since.pop(author, None)
        if author in self._raw:
            del self._map[author]
            del self._raw[author]
            self._mark = None

    @property
    def wants_compaction(self) -> bool:
        """Whether the document's history outweighs its content. Costs an encoding: ask seldom."""
        size = self.document_bytes
        threshold = max(self.config.compact_at_bytes, self.config.compact_at_ratio * self.live_bytes)
        return self.epoch < EPOCH_MAX and size > threshold

    def compact(self) -> None:
        """Begin a new epoch with the best rows only, each chunk of them under a client id of its own."""
        self.epoch += 1
        self._document, self._map = self._fresh_document()
        for chunk in self._chunks():
            writer, rows = self._fresh_document()
            for author in chunk:
                rows[author] = self._rows[author].sealed
            self._document.apply_update(writer.get_update())
        self._raw = {author: self._rows[author].sealed for author in sorted(self._rows)}
        self._damaged_since.clear()
        self._mark = None
        self._good = self._document.get_update()

    # --- the snapshot ----------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The best rows and the epoch, for the disk."""
        body = bytearray(self.epoch.to_bytes(8, "big"))
        for author in sorted(self._rows):
            sealed = self._rows[author].sealed
            body += len(sealed).to_bytes(4, "big") + sealed
        return SNAPSHOT_MAGIC + crc32(body).to_bytes(4, "big") + bytes(body)

    def check(self) -> None:
        """The rules that hold between any two calls."""
        assert len(self._rows) <= self.config.rows_max, "more rows than rows_max"
        own = self._rows.get(self._local)
        if own is not None and self._sequence:
            assert own.stamp == (self._incarnation, self._sequence), "own row is not the last one published"
            healthy = self._raw.get(self._local) == own.sealed
            assert healthy or self._local in self._damaged_since, "own row is damaged and nobody knows"
        for author, held in self._rows.items():
            assert held.envelope.author == author, f"row of {author} was signed by {held.envelope.author}"
        assert set(self._damaged_since) <= set(self._rows), "damage is noted for rows that do not exist"

    # --- inside ----------------------------------------------------------------------------

    def _fresh_document(self) -> tuple[Doc[Map[bytes]], Map[bytes]]:
        """An empty document under a client id that nobody has used: a reused one loses writes."""
        document: Doc[Map[bytes]] = Doc(client_id=self._rng.getrandbits(CLIENT_ID_BITS))
        return document, document.get("rows", type=Map)

    def _encode(self, claimed: dict[int, int]) -> bytes | None:
        try:
            return self._document.get_update(encode_state_vector(claimed))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - the library panics with a BaseException
            self._rebuild()
            return None

    def _apply_guarded(self, update: bytes, now: float) -> None:
        """Apply an update; where the library fails on it, or no longer works afterwards, rebuild."""
        try:
            self._document.apply_update(update)
            if now - self._good_at < self.config.good_copy_interval_s:
                return
            good = self._document.get_update()
        except (KeyboardInterrupt, SystemExit):
            raise
        except ValueError:  # refused before anything was changed
            self.rejected += 1
        except BaseException:  # noqa: BLE001 - PanicException is not an Exception
            self.rejected += 1
            self._rebuild()
        else:
            if len(good) > self.config.document_bytes_max:
                self.rejected += 1
                self._rebuild()
                return
            self._good, self._good_at = good, now

    def _rebuild(self) -> None:
        """Start again from the last document that could be encoded; peers bring the rest."""
        self.rebuilds += 1
        self._document, self._map = self._fresh_document()
        if self._good is not None:
            try:
                self._document.apply_update(self._good)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # noqa: BLE001 - then without it
                self._good = None
                self._document, self._map = self._fresh_document()
        self._raw = dict(self._values())
        self._mark = None
        if self._local in self._rows and self._raw.get(self._local) != self._rows[self._local].sealed:
            self._write(self._local)

    def _values(self) -> Iterator[tuple[str, bytes]]:
        """The document's plain values as bytes, sorted by key, at most ``rows_max``."""
        try:
            items = dict(self._map.items())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - a panic while reading
            self.rejected += 1
            return
        for key in sorted(items)[: self.config.rows_max]:
            value: object = items[key]
            if isinstance(value, (bytes, bytearray)):
                yield key, bytes(value)

    def _read(self, now: float) -> tuple[NodeId, ...]:
        """Compare the document with what it held before; keep what is better, note what is damaged."""
        before, after = self._raw, dict(self._values())
        if before == after:
            return ()
        self._raw, self._mark = after, None
        changed = []
        for key, raw in after.items():
            if before.get(key) != raw and self._consider(NodeId(key), raw, now):
                changed.append(NodeId(key))
        if self._local in self._rows and self._local not in after:
            self._damaged_since.setdefault(self._local, now)
        return tuple(changed)

    def _consider(self, author: NodeId, raw: bytes, now: float) -> bool:
        """Whether the value under an author's key is news; worse ones are noted as damage."""
        held = self._rows.get(author)
        envelope = self._sealer.open(raw) if len(raw) <= ROW_BYTES_MAX else None
        if envelope is None or envelope.author != author:
            self.rejected += 1
            if held is not None:
                self._damaged_since.setdefault(author, now)
            return False
        stamp = (envelope.incarnation, envelope.sequence)
        if held is not None and stamp <= held.stamp:
            if raw == held.sealed:
                self._damaged_since.pop(author, None)
            else:
                self._damaged_since.setdefault(author, now)
            return False
        if held is None and len(self._rows) >= self.config.rows_max:
            self.rejected += 1
            return False
        if author == self._local:  # an earlier life of ours, or a copy of our key: never taken over
            # Under our own incarnation it takes a still higher one to outbid what that life may yet sign.
            above = envelope.incarnation == self._incarnation
            self.own_incarnation_seen = max(self.own_incarnation_seen, envelope.incarnation + above)
            if held is not None:
                self._damaged_since.setdefault(author, now)
            return False
        self._rows[author] = Held(sealed=raw, envelope=envelope)
        self._damaged_since.pop(author, None)
        return True

    def _mend(self, now: float) -> None:
        """The owner writes its damaged row again at once; for others' rows, a while is left to them."""
        own = self._rows.get(self._local)
        due = now - self._own_repaired_at >= self.config.own_repair_interval_s
        if own is not None and self._raw.get(self._local) != own.sealed and due:
            self._own_repaired_at = now
            self._write(self._local)
        for author, since in list(self._damaged_since.items()):
            if author != self._local and now - since >= self.config.repair_after_s:
                self._write(author)

    def _write(self, author: NodeId) -> None:
        sealed = self._rows[author].sealed
        self._map[author] = sealed
        self._raw[author] = sealed
        self._damaged_since.pop(author, None)
        self._mark = None

    def _adopt(self, epoch: int, now: float) -> bool:
        """Begin an epoch that another node compacted into; at a bounded rate, for it costs a full sync."""
        if now - self._adopted_at < self.config.adopt_interval_s:
            return False
        self._adopted_at = now
        self.epoch = epoch
        self._document, self._map = self._fresh_document()
        self._raw, self._mark, self._good = {}, None, None
        self._damaged_since.clear()
        if self._local in self._rows:
            self._write(self._local)
        return True

    def _chunks(self) -> Iterator[list[NodeId]]:
        chunk: list[NodeId] = []
        size = 0
        for author in sorted(self._rows):
            row_bytes = len(self._rows[author].sealed)
            if chunk and size + row_bytes > self.config.compact_chunk_bytes:
                yield chunk
                chunk, size = [], 0
            chunk.append(author)
            size += row_bytes
        if chunk:
            yield chunk

    def _restore(self, snapshot: bytes) -> None:
        """Take back the rows of an earlier life, as far as they are undamaged and well signed."""
        head = len(SNAPSHOT_MAGIC)
        body = snapshot[head + 4 :]
        checksum = int.from_bytes(snapshot[head : head + 4], "big")
        if snapshot[:head] != SNAPSHOT_MAGIC or len(body) < 8 or crc32(body) != checksum:
            self.snapshot_damaged = True
            return
        offset = 8
        while offset + 4 <= len(body) and len(self._rows) < self.config.rows_max:
            size = int.from_bytes(body[offset : offset + 4], "big")
            sealed = body[offset + 4 : offset + 4 + size]
            offset += 4 + size
            envelope = self._sealer.open(sealed)
            # Our own old row is history: this life publishes its own.
            if envelope is not None and envelope.author != self._local:
                self._rows[envelope.author] = Held(sealed=sealed, envelope=envelope)


def encode_state_vector(clocks: Mapping[int, int]) -> bytes:
    """Yjs' state vector: a count, then (client, clock) pairs, all LEB128."""
    out = bytearray(_leb128(len(clocks)))
    for client, clock in clocks.items():
        out += _leb128(client) + _leb128(clock)
    return bytes(out)


def decode_state_vector(data: bytes) -> dict[int, int] | None:
    """The clocks, or None for bytes that are not one state vector of acceptable size."""
    if len(data) > STATE_VECTOR_BYTES_MAX:
        return None
    numbers: list[int] = []
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number = shift = 0
        elif shift > 63:
            return None
    if shift or not numbers or len(numbers) != 1 + 2 * numbers[0]:
        return None
    return dict(zip(numbers[1::2], numbers[2::2], strict=True))


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
