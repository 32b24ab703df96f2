"""Identity: one key for life, and envelopes that only their author can make."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import InvalidRequest, StateFolderInvalid
from fieldmesh.core.messages import Envelope, Sealer
from fieldmesh.runtime import identity
from fieldmesh.runtime.identity import EnvelopeSealer, Identity, node_id, verify
from fieldmesh.runtime.state import StateFolder
from fieldmesh.v1.envelope_pb2 import SignedEnvelope

ANNA, BERT = Identity.generate(), Identity.generate()
SEALED = EnvelopeSealer(ANNA, "row").seal(3, 4, b"payload")


def opener(purpose: str = "row") -> Sealer:
    return EnvelopeSealer(BERT, purpose)


def test_the_key_is_made_once_private_and_kept(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path) as folder:
        first = Identity.load(folder)
        assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    with StateFolder.open(tmp_path) as folder:
        assert Identity.load(folder).id == first.id


def test_the_id_is_the_head_of_the_keys_hash() -> None:
    assert len(ANNA.id) == 32
    assert ANNA.id == node_id(ANNA.public_key)
    assert ANNA.id != BERT.id


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()],
    ids=["p384", "ed25519"],
)
def test_another_kind_of_key_is_refused(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
) -> None:
    with StateFolder.open(tmp_path) as folder:
        (tmp_path / "key.pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        with pytest.raises(StateFolderInvalid, match="P-256"):
            Identity.load(folder)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n", b"\xff" * 9_000])
def test_a_damaged_key_is_never_replaced_silently(tmp_path: Path, content: bytes) -> None:
    with StateFolder.open(tmp_path) as folder:
        Identity.load(folder)
        (tmp_path / "key.pem").write_bytes(content)
        with pytest.raises(StateFolderInvalid, match=r"key\.pem"):
            Identity.load(folder)
        assert (tmp_path / "key.pem").read_bytes() == content


# --- envelopes -----------------------------------------------------------------------------


@given(
    incarnation=st.integers(0, 2**64 - 1), sequence=st.integers(0, 2**64 - 1), payload=st.binary(max_size=300)
)
def test_what_one_node_seals_another_opens(incarnation: int, sequence: int, payload: bytes) -> None:
    sealed = EnvelopeSealer(ANNA, "row").seal(incarnation, sequence, payload)
    expected = Envelope(author=ANNA.id, incarnation=incarnation, sequence=sequence, payload=payload)
    sealer = opener()
    assert sealer.open(sealed) == expected
    assert sealer.open(sealed) == expected


@given(position=st.integers(0, len(SEALED) - 1), flip=st.integers(1, 255))
def test_no_byte_of_an_envelope_can_be_changed(position: int, flip: int) -> None:
    changed = bytearray(SEALED)
    changed[position] ^= flip
    assert opener().open(bytes(changed)) is None


@given(cut=st.integers(0, len(SEALED) - 1), tail=st.binary(min_size=1, max_size=20))
def test_an_envelope_can_be_neither_cut_nor_lengthened(cut: int, tail: bytes) -> None:
    assert opener().open(SEALED[:cut]) is None
    assert opener().open(SEALED + tail) is None


@given(data=st.binary(max_size=400))
def test_hostile_bytes_never_raise(data: bytes) -> None:
    assert opener().open(data) is None


@given(
    public_key=st.one_of(
        st.binary(max_size=100), st.binary(min_size=65, max_size=65).map(lambda p: ANNA.public_key[:26] + p)
    ),
    signature=st.binary(max_size=70),
)
def test_hostile_keys_and_signatures_never_raise(public_key: bytes, signature: bytes) -> None:
    assert not verify(public_key, signature, b"message")


def test_an_envelope_of_one_purpose_is_none_of_another() -> None:
    assert opener("session-turn").open(SEALED) is None


def test_nobody_can_sign_for_another() -> None:
    forged = SignedEnvelope.FromString(EnvelopeSealer(BERT, "row").seal(3, 5, b"payload"))
    forged.public_key = ANNA.public_key
    assert opener().open(forged.SerializeToString(deterministic=True)) is None


def test_the_mirrored_signature_is_refused() -> None:
    """(r, -s) satisfies ECDSA as well: without a rule anybody could respell an envelope."""
    mirrored = SignedEnvelope.FromString(SEALED)
    s = int.from_bytes(mirrored.signature[32:], "big")
    mirrored.signature = mirrored.signature[:32] + (identity._ORDER - s).to_bytes(32, "big")
    assert opener().open(mirrored.SerializeToString(deterministic=True)) is None


def test_a_compressed_key_is_another_spelling_and_refused() -> None:
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), ANNA.public_key[26:])
    respelled = SignedEnvelope.FromString(SEALED)
    respelled.public_key = point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    assert opener().open(respelled.SerializeToString(deterministic=True)) is None


def test_sizes_are_bounded_on_both_sides() -> None:
    small, large = EnvelopeSealer(ANNA, "row", 400), EnvelopeSealer(ANNA, "row", 800)
    with pytest.raises(InvalidRequest, match="others accept 400"):
        small.seal(1, 1, b"x" * 400)
    assert small.open(large.seal(1, 1, b"x" * 400)) is None


def test_a_repeated_envelope_is_not_verified_again_and_the_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity, "VERIFIED_MAX", 2)
    verified: list[bytes] = []
    real = identity.verify

    def counting(public_key: bytes, signature: bytes, message: bytes) -> bool:
        verified.append(message[-1:])
        return real(public_key, signature, message)

    monkeypatch.setattr(identity, "verify", counting)
    author, reader = EnvelopeSealer(ANNA, "row"), EnvelopeSealer(BERT, "row")
    a, b, c = (author.seal(1, n, letter) for n, letter in enumerate((b"a", b"b", b"c")))
    for sealed in (a, a, b, a, c, a, b):
        assert reader.open(sealed) is not None
    assert verified == [b"a", b"b", b"c", b"b"]
