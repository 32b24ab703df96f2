"""A discrete-event world that runs the same core as a real node, over a clock and a network of its own."""
