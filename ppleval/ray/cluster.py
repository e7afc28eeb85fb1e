"""A Ray cluster for a run: the one that RAY_ADDRESS names, or one of this machine alone."""

import contextlib
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# The folder that holds ppleval.
ROOT = str(Path(__file__).resolve().parents[2])


def imported() -> ModuleType:
    """Ray, after setting what it reads from the environment when it is imported.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("This needs Ray: pip install 'ray[data]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data speaks of its own doings
    if "RAY_ADDRESS" not in os.environ:
        # As Ray does on Windows and macOS: all of its ports are of the loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    return ray


@contextlib.contextmanager
def cluster(workers: int | None = None) -> Iterator[None]:
    """Connect to the cluster; in the end, disconnect, and shut a local one down.

    A cluster of this machine listens on the loopback interface only and has no dashboard. Where Ray
    is connected already, that is used, and left as it is.

    Args:
        workers: for a local one, the CPUs that it counts; those of the machine by default.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: the cluster cannot be reached.
    """
    ray, address = imported(), os.environ.get("RAY_ADDRESS", "local")
    if ray.is_initialized():
        yield
        return
    if address != "local":
        _check_reachable(address)
    local = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    # Workers import this library.
    paths = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        with _quiet_start():
            ray.init(
                address=address,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        _quiet_data()
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ConnectionError unless something listens there; Ray would wait for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():  # such as "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()
    except OSError as error:
        raise ConnectionError(
            f"No Ray cluster answers at RAY_ADDRESS={address}: {error}"
        ) from error


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Leave out what the C++ part of Ray says of its start; errors are Python's."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_data() -> None:
    """Ray Data shows its progress on a terminal, and nothing else but errors."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def pool(workers: int | None, device: str | None) -> dict:
    """What `Dataset.map` and `map_batches` take for workers that hold a model each.

    Args:
        workers: how many; by default one for each GPU of the cluster, without any one for each CPU.
        device: as for a model. A CPU is asked for by "cpu".

    Raises:
        ValueError: the cluster is too small.
    """
    import ray
    from ray.data import ActorPoolStrategy

    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) >= 1 and device != "cpu" else "CPU"
    most = int(resources.get(kind, 0))
    if (workers or 1) > most:
        raise ValueError(
            f"--workers {workers or 1} needs a {kind} each, and the Ray cluster has {most}."
        )
    each = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    return {"compute": ActorPoolStrategy(size=workers or most), **each}
