"""Runs suites of prompts through a session, and reports speed and identity of the answers."""
