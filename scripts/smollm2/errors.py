"""The error of this tool."""


class SmolLM2Error(Exception):
    """The model cannot be made, with the reason."""
