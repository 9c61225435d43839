"""Heuristics that grow token trees with the draft model. They decide the speed, never the tokens."""
