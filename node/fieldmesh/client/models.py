"""The models of one node from Python. Owns: asking exactly the node that is named, for they are its own.

Must not: ask another node in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc

from fieldmesh.client import calls
from fieldmesh.core.model import Address
from fieldmesh.v1 import models_pb2 as pb
from fieldmesh.v1.models_pb2_grpc import ModelServiceStub

TIMEOUT_S: Final = 10.0
LOAD_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """The model of one profile at one node. ``state`` is cold, loading, ready, ending, lost or failed.

    ``estimated_bytes`` count against the node's budget, ``resident_bytes`` are in memory now. ``threads`` and
    the tokens of a step (``prefill_tokens`` of prompts alone, ``mixed_tokens`` beside running streams) are 0
    while the model is not loaded; ``measured`` says from what they were chosen, nothing where all are fixed.
    """

    profile: str
    model: str
    state: str
    loaded_share: float
    estimated_bytes: int
    resident_bytes: int
    running: int
    queued: int
    fingerprint: str
    problem: str
    threads: int
    prefill_tokens: int
    mixed_tokens: int
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModels:
    """The models of one node, and what they may take together."""

    models: tuple[LocalModel, ...]
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """SHA-256 of a model's file as it is now, and the one on record (empty where none is)."""

    found: str
    recorded: str

    @property
    def same(self) -> bool:
        return self.found == self.recorded


class ModelKeeper:
    """Shows and changes which models one node has in memory. Use it as a context.

    Raises FieldmeshError: ProfileNotFound, ModelInUse, ModelFileInvalid, EngineNotReady, NodeUnreachable.
    """

    def __init__(self, node: Address) -> None:
        self._node = node
        self._channel = grpc.insecure_channel(str(node), options=calls.CHANNEL_OPTIONS)
        self._stub: Any = ModelServiceStub(self._channel)

    def __enter__(self) -> ModelKeeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def list(self) -> LocalModels:
        """All models of the node's profiles."""
        answer = self._unary("ListLocalModels", pb.ListLocalModelsRequest(), TIMEOUT_S)
        return LocalModels(
            models=tuple(_model(model) for model in answer.models), budget_bytes=answer.budget_bytes
        )

    def load(self, profile: str) -> Iterator[LocalModel]:
        """Bring a model into memory; yields how far it is, and last the loaded model."""
        call = self._stub.LoadModel(pb.LoadModelRequest(profile=profile), timeout=LOAD_TIMEOUT_S)
        try:
            for answer in call:
                yield _model(answer.model)
        except grpc.RpcError as failure:
            raise calls.translated(failure, self._node) from None
        finally:
            call.cancel()

    def unload(self, profile: str) -> LocalModel:
        """Take an idle model out of memory."""
        return _model(self._unary("UnloadModel", pb.UnloadModelRequest(profile=profile), TIMEOUT_S).model)

    def verify(self, profile: str) -> Verified:
        """Read a model's file anew and compare."""
        answer = self._unary("VerifyModel", pb.VerifyModelRequest(profile=profile), LOAD_TIMEOUT_S)
        return Verified(found=answer.found, recorded=answer.recorded)

    def _unary(self, method: str, request: object, timeout_s: float) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as failure:
            raise calls.translated(failure, self._node) from None


def _model(told: pb.LocalModel) -> LocalModel:
    known = told.state in pb.ModelState.values()
    state = pb.ModelState.Name(told.state) if known else "MODEL_STATE_UNSPECIFIED"
    return LocalModel(
        profile=told.profile,
        model=told.model,
        state=state.removeprefix("MODEL_STATE_").lower(),
        loaded_share=told.loaded_share,
        estimated_bytes=told.estimated_bytes,
        resident_bytes=told.resident_bytes,
        running=told.running,
        queued=told.queued,
        fingerprint=told.fingerprint,
        problem=told.problem,
        threads=told.threads,
        prefill_tokens=told.prefill_tokens,
        mixed_tokens=told.mixed_tokens,
        measured=told.measured,
    )
