"""Where the mesh is, for suites that run in an environment without Fieldmesh: see ``__main__``."""

from __future__ import annotations

import os

import pytest

CODING = "Write a function that adds two numbers"
"""A question of the domain that the node which is asked does not own."""


@pytest.fixture(scope="session")
def http() -> str:
    """The HTTP door of the node to ask."""
    return os.environ["MESH_HTTP"]


@pytest.fixture(scope="session")
def v1(http: str) -> str:
    """The base of OpenAI's API there."""
    return f"{http}/v1"


@pytest.fixture(scope="session")
def grpc_address() -> str:
    """The gRPC door of the node to ask."""
    return os.environ["MESH_GRPC"]


@pytest.fixture
def coding() -> str:
    return CODING
