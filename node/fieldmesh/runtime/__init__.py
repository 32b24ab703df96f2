"""The asyncio shell of a node: network, disk, identity, clock, and the composition root."""
