"""subspec: exact 16-bit language models beyond the device's memory, at speculative speed."""

__version__ = "0.1.0"
