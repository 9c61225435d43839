"""Bytes and files: finding models, reading checkpoints, writing and loading substitutes. No model code."""
