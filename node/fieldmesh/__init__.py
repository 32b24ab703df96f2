"""Fieldmesh: a peer-to-peer mesh of edge inference nodes."""

__version__ = "0.1.0"
