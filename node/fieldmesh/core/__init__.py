"""Decisions: pure state machines and pure functions.

Nothing in this package reads a clock, opens a socket or a file, logs, or draws
randomness of its own: ``now`` (seconds on a monotonic clock) and ``random.Random``
come in as arguments, effects go out as values.
"""
