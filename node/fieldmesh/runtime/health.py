"""The standard health service. Owns: what SERVING means for this node and for each profile it hosts.

The whole server ("" and each service) serves while anybody in its view can answer, because any node passes
questions on; it begins to when its own engine has settled for the first time. A profile
("fieldmesh.v1.InferenceService/NAME") serves while this node can answer for it, if need be after loading.
Must not: decide routing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grpc_health.v1 import health, health_pb2

from fieldmesh.core.model import EngineState, Member, MeshView, NodeState
from fieldmesh.v1 import inference_pb2, mesh_pb2

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MESH = mesh_pb2.DESCRIPTOR.services_by_name["MeshService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def statuses(
    view: MeshView, profiles: Mapping[str, bool], *, draining: bool, settled: bool
) -> dict[str, bool]:
    """Whether each health service serves. ``profiles``: those of this node, with whether it can answer for
    them. ``settled``: the own engine has been ready, or was given up."""
    anybody = settled and not draining and any(_can_answer(member) for member in view.members)
    return {"": anybody, INFERENCE: anybody, MESH: not draining} | {
        f"{INFERENCE}/{profile}": able and not draining for profile, able in profiles.items()
    }


def _can_answer(member: Member) -> bool:
    load = member.load
    return member.state is NodeState.ALIVE and load.engine is EngineState.READY and not load.draining


class Health:
    """Keeps the health service in step with the mesh."""

    def __init__(self, profiles: Callable[[], Mapping[str, bool]]) -> None:
        self.servicer = health.aio.HealthServicer()
        self._profiles = profiles
        self._settled = False
        self._told: dict[str, bool] = {}

    async def update(self, view: MeshView, *, draining: bool = False) -> None:
        """Tell watchers what changed."""
        (local,) = [member for member in view.members if member.id == view.local]
        self._settled |= local.load.engine in (EngineState.READY, EngineState.FAILED)
        now = statuses(view, self._profiles(), draining=draining, settled=self._settled)
        for name, serves in now.items():
            if self._told.get(name) is not serves:
                await self.servicer.set(name, SERVING if serves else NOT_SERVING)
        self._told = now
