"""``ModelService`` at this node: what operators ask of its models. Owns: translating. Must not: load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.runtime.door import Context, guarded, guarded_stream
from fieldmesh.runtime.models import Models, ModelStatus
from fieldmesh.v1 import models_pb2 as pb

MODELS = pb.DESCRIPTOR.services_by_name["ModelService"]
PROGRESS_INTERVAL_S = 0.25
PROFILE_CHARS_MAX = 128

_STATES = {
    "cold": pb.MODEL_STATE_COLD,
    "loading": pb.MODEL_STATE_LOADING,
    "ready": pb.MODEL_STATE_READY,
    "ending": pb.MODEL_STATE_ENDING,
    "lost": pb.MODEL_STATE_LOST,
    "failed": pb.MODEL_STATE_FAILED,
}


class Keeper:
    """``ModelService``. Errors: PROFILE_NOT_FOUND, MODEL_IN_USE, MODEL_FILE_INVALID, ENGINE_NOT_READY."""

    def __init__(self, models: Models) -> None:
        self._models = models

    @guarded
    async def ListLocalModels(
        self, request: pb.ListLocalModelsRequest, context: Context
    ) -> pb.ListLocalModelsResponse:
        return pb.ListLocalModelsResponse(
            models=[_proto(status) for status in self._models.statuses()],
            budget_bytes=self._models.budget_bytes,
        )

    @guarded_stream
    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> AsyncGenerator[pb.LoadModelResponse, None]:
        profile = _profile(request.profile)
        self._models.find(profile)
        loading = asyncio.ensure_future(self._models.load(profile))
        try:
            while not loading.done():
                yield pb.LoadModelResponse(model=_proto(self._models.status(profile)))
                await asyncio.wait((loading,), timeout=PROGRESS_INTERVAL_S)
            loading.result()
            yield pb.LoadModelResponse(model=_proto(self._models.status(profile)))
        finally:
            loading.cancel()

    @guarded
    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        profile = _profile(request.profile)
        await self._models.unload(profile)
        return pb.UnloadModelResponse(model=_proto(self._models.status(profile)))

    @guarded
    async def VerifyModel(self, request: pb.VerifyModelRequest, context: Context) -> pb.VerifyModelResponse:
        found, recorded = await self._models.verify(_profile(request.profile))
        return pb.VerifyModelResponse(found=found, recorded=recorded)


def _profile(name: str) -> str:
    if not 1 <= len(name) <= PROFILE_CHARS_MAX:
        raise InvalidRequest(f"profile must have 1 to {PROFILE_CHARS_MAX} characters", field="profile")
    return name


def _proto(status: ModelStatus) -> pb.LocalModel:
    return pb.LocalModel(
        profile=status.profile,
        model=status.model,
        state=_STATES[status.state],
        loaded_share=status.loaded_share,
        estimated_bytes=status.estimated_bytes,
        resident_bytes=status.resident_bytes,
        running=status.running,
        queued=status.queued,
        fingerprint=status.fingerprint,
        problem=status.problem,
        threads=status.threads,
        prefill_tokens=status.prefill_tokens,
        mixed_tokens=status.mixed_tokens,
        measured=status.measured,
    )
