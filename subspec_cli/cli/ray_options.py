"""What `batch --ray` and `serve --ray` check and fill in before Ray is imported."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec

from subspec_cli.config import Config
from subspec_cli.errors import UsageError


def check_ray(address: str | None, replicas: int | None) -> None:
    """Refuse options that mean nothing without each other, and Ray that is not installed."""
    if address is None and replicas is not None:
        raise UsageError(
            f"--replicas {replicas} needs Ray", f"--ray local --replicas {replicas}, or --ray HOST:PORT"
        )
    if address is not None and find_spec("ray") is None:
        raise UsageError("ray is not installed", "pip install 'subspec-cli[ray]'")


def named_model(config: Config) -> Config:
    """The settings with a name of the model that means the same on every node.

    Raises UsageError if no model is named and none was used here.
    """
    from subspec_cli.substitutes.prepared_names import full_name, last_used_id

    model = config.model.model
    name = last_used_id(config.model.bits) if model is None else full_name(model)
    if name is None:
        raise UsageError("no model is named, and none was used here", "--model MODEL names one")
    if os.path.isdir(path := os.path.expanduser(name)):
        name = os.path.abspath(path)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model=name))


def on_device(config: Config, device: str) -> Config:
    """The settings with a device that is the same for all replicas."""
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, device=device))
