"""Joining a Ray cluster, or starting one on this machine for as long as a command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.units import counted, printable

LOCAL: Final = "local"
"""The address that starts a Ray of this command's own."""
_CONNECT_S: Final = 5.0
_STORE_BYTES: Final = 128 << 20
"""Memory for Ray's objects: a job's lines and records are small."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a command may use of a cluster."""

    replicas: int
    device: str
    """`cuda` or `cpu`, the same for all replicas."""

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray reserves for each replica, spread over the nodes."""
        gpus = 1 if self.device == "cuda" else 0
        return {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}


@contextlib.contextmanager
def ray_cluster(address: str, replicas: int | None, device: str) -> Iterator[Cluster]:
    """Connect to Ray, and leave it at the end; a local one is ended.

    Without a number there is a replica for each GPU, or on the CPU for each node. Raises ResourceError if there is no
    cluster, and UsageError if it is too small.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        processors = max(replicas or 1, os.cpu_count() or 1)
        how |= {"include_dashboard": False, "num_cpus": processors, "object_store_memory": _STORE_BYTES}
    check_answers(address)
    with _silent_stdout():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, **how)
            with contextlib.suppress(ValueError):  # not the main thread, where Ray sets none either
                signal.signal(signal.SIGTERM, handler)  # Ray's own would leave without a summary
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            words = printable(str(error)).strip().partition("\n")[0]
            raise ResourceError(
                f"Ray at {address} cannot be used: {words}",
                "--ray local starts one for the command; a cluster that asks for a token needs "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
            ) from error
        try:
            yield checked_cluster(ray.cluster_resources(), len(ray.nodes()), replicas, device)
        finally:
            ray.shutdown()


def check_answers(address: str) -> None:
    """Raise ResourceError if nothing listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"nothing answers at {printable(address)}: {getattr(error, 'strerror', None) or error}",
            "ray start --head begins a cluster and says its address",
        ) from error


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep Ray from stdout, where a command's result goes: it prints there that a worker has died."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def checked_cluster(found: dict[str, float], nodes: int, replicas: int | None, device: str) -> Cluster:
    """Return what a command takes of the resources that were found; raises UsageError if they are too few."""
    gpus, processors = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    wanted = replicas or (gpus if device == "cuda" else nodes) or 1
    has = gpus if device == "cuda" else processors
    if wanted > has:
        what = "GPU" if device == "cuda" else "processor"
        raise UsageError(
            f"{counted(wanted, 'replica')} need as many {what}s, the cluster has {has}",
            f"--replicas {has}" if has else "--device cpu runs without a GPU",
        )
    return Cluster(wanted, device)
