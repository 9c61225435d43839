"""Weights from disk or host memory into slots, in the order of use. Knows nothing of tokens or attention."""
