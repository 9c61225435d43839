"""Substitutes on disk: how they are made, found, verified and removed. Knows nothing of how models run."""
