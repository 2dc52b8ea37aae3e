"""Checks on a machine that trains: plain functions that run there, without Ray.

Importing this module is cheap, because every node does so first: only the checks that need torch
or MLflow import them.
"""

import email.utils
import http.client
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_pipelines import storage
from data_pipelines.loading.cache_folder import choose_cache_dir
from data_pipelines.loading.pixel_cache import measure_pixels
from data_pipelines.loading.shard_cache import measure_cache
from data_pipelines.storage import Location
from data_pipelines.storage.location import endpoint
from data_pipelines.storage.objects import PREFLIGHT_SECONDS
from efae.preflight.checks import Note
from efae.tracking.server import Server

SPARE_BYTES = 2**30
"""Room for checkpoints before their upload, Ray's logs, and metrics that wait for MLflow."""
SHARED_MEMORY_BYTES = 64 * 2**20
CLOCK_SECONDS = 300.0
"""Largest tolerated clock error; S3 refuses signatures that are 900 s off."""
_REQUEST_SECONDS = 5.0


def list_versions() -> dict[str, str]:
    """Return the versions of Python (major.minor), torch (without its build suffix) and Ray."""
    found = {"python": "{}.{}".format(*sys.version_info)}
    for package in ("torch", "ray"):
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def check_versions(expected: dict[str, str]) -> str:
    """Check that this machine has the driver's versions.

    Args:
        expected: Result of `list_versions` on the driver.

    Raises:
        ValueError: A version differs.
    """
    found = list_versions()
    wrong = [
        f"{name} {found[name]} here, {wanted} where the driver runs"
        for name, wanted in expected.items()
        if found[name] != wanted
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: install the same versions on every node")
    return ", ".join(f"{name} {number}" for name, number in found.items())


def find_clock(storage_uri: str, server: Server) -> str:
    """Return the URL of the server to compare clocks with: S3, which checks the time, or MLflow."""
    s3 = endpoint() or "https://s3.amazonaws.com"
    scheme, _, rest = (s3 if storage_uri.startswith("s3:") else server.uri).partition("://")
    host = rest.partition("/")[0].rpartition("@")[2]  # without user name and password
    return f"{scheme}://{host}" if host else ""


def check_clock(url: str) -> str:
    """Compare this machine's clock with the Date header of a server, to about a second.

    Args:
        url: URL of any HTTP server; a refusal carries a date too.

    Raises:
        ValueError: The clocks differ by more than `CLOCK_SECONDS`.
        Note: The server does not answer, or sends no date.
    """
    asked = time.time()
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as refusal:
        with refusal:
            date = refusal.headers["Date"]
    except (OSError, http.client.HTTPException) as error:
        raise Note(f"not compared: no answer from {url} ({error})") from error
    waited = time.time() - asked
    if date is None:
        raise Note(f"not compared: {url} sends no Date header")
    # The server truncated its time to whole seconds, at some moment between request and answer.
    ahead = asked + waited / 2 - (email.utils.parsedate_to_datetime(date).timestamp() + 0.5)
    if abs(ahead) > CLOCK_SECONDS:
        raise ValueError(
            f"about {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}; S3 refuses"
            " requests that are 900 s off: set the clock, and keep it set with chrony or"
            " systemd-timesyncd"
        )
    if abs(ahead) <= 1 + waited / 2:
        return f"within {1 + waited / 2:.0f} s of {url}"
    return f"about {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}"


def check_disk(cache_dir: str | None, cache_bytes: int) -> str:
    """Check the free space for the caches, and for `SPARE_BYTES` in the temporary folder.

    Args:
        cache_dir: Setting data.cache_dir.
        cache_bytes: Maximum size of the caches; their present content counts as free space.

    Raises:
        ValueError: The free space is too small.
    """
    cache = choose_cache_dir(cache_dir)
    needs = [
        (cache, max(0, cache_bytes - measure_cache(cache) - measure_pixels(cache))),
        (Path(tempfile.gettempdir()), SPARE_BYTES),
    ]
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, need in needs:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, need))
    found: list[str] = []
    for places in disks.values():
        free, need = shutil.disk_usage(places[0][0]).free, sum(need for _, need in places)
        names = " and ".join(dict.fromkeys(str(place) for place, _ in places))
        if free < need:
            raise ValueError(
                f"{_gib(free)} GiB free in {names}, the run may need {_gib(need)}: make space, name"
                " another folder (data.cache_dir, TMPDIR), or lower data.cache_bytes or"
                " data.pixel_cache_bytes"
            )
        found.append(f"{_gib(free)} GiB free in {names}, {_gib(need)} needed at most")
    return "; ".join(found)


def check_shared_memory(required: bool, folder: str = "/dev/shm") -> str:
    """Check the free shared memory, which holds Ray's objects and NCCL's buffers.

    Args:
        required: Whether training fails without it, as NCCL does.
        folder: Mount point of shared memory.

    Raises:
        ValueError: Less than `SHARED_MEMORY_BYTES` is free.
        Note: Too little is free, but not required: Ray uses the temporary folder instead.
    """
    free = shutil.disk_usage(folder).free if Path(folder).exists() else 0
    if free >= SHARED_MEMORY_BYTES:
        return f"{_gib(free)} GiB free"
    problem = (
        f"{free >> 20} MiB free in {folder}, {SHARED_MEMORY_BYTES >> 20} wanted: start the"
        " container with --shm-size=2g or, in Kubernetes, mount an emptyDir of medium Memory there"
    )
    if required:
        raise ValueError(problem)
    raise Note(f"{problem}; until then Ray keeps its objects in the temporary folder, slower")


def check_mark(mark: Location) -> None:
    """Check that this node reads what the driver wrote: it has credentials, storage is shared.

    Args:
        mark: Location of a non-empty object that the driver wrote.

    Raises:
        ValueError: The object is not visible here.
        StorageError: Access is denied, or storage is unreachable.
    """
    try:
        storage.read_range(mark, 0, 1, PREFLIGHT_SECONDS)
    except FileNotFoundError as error:
        raise ValueError(
            f"what the driver wrote to {mark.display.rpartition('/')[0]} is not visible here: set"
            " ray.storage_uri to storage that all nodes share, such as s3://"
        ) from error


def check_auth(dashboard: str) -> str:
    """Check that Ray's job API, which runs any command, refuses requests without the token.

    Args:
        dashboard: Host and port of the dashboard, as reachable from this machine.

    Raises:
        ValueError: The request succeeded.
        Note: The dashboard does not answer.
    """
    try:
        connection = http.client.HTTPConnection(dashboard, timeout=_REQUEST_SECONDS)
        connection.request("GET", "/api/jobs/")
        status = connection.getresponse().status
        connection.close()
    except (OSError, http.client.HTTPException) as error:
        raise Note(f"not checked: no answer from the dashboard at {dashboard} ({error})") from error
    if status == 200:
        raise ValueError(
            f"anyone who reaches http://{dashboard} can run programs on the cluster without token:"
            " start every node, and every client, with RAY_AUTH_MODE=token and the same token"
        )
    if status not in (401, 403):
        raise Note(f"not checked: the dashboard at {dashboard} answered {status}")
    return f"a request without token was refused ({status})"


def check_gpus(count: int, precision: str, several_workers: bool) -> str:
    """Check that this process can use the machine's GPUs.

    Args:
        count: Number of GPUs that Ray assigns to workers here.
        precision: Setting training.precision.
        several_workers: Whether the run has more than one worker; they communicate by NCCL.

    Raises:
        ValueError: There are fewer GPUs than `count`, one lacks the precision, or NCCL is missing.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < count:
        raise ValueError(
            f"Ray counts {count} GPUs here, torch {torch.__version__} sees {seen}"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): install"
            " torch for CUDA and a driver as new as that asks for (nvidia-smi)"
        )
    names = {torch.cuda.get_device_name(index): None for index in range(seen)}
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{', '.join(names)}: no bf16; set --training.precision fp16")
    found = f"{seen} x {', '.join(names)}"
    free = min(torch.cuda.mem_get_info(index)[0] for index in range(seen))
    found += f", at least {_gib(free)} GiB free on each"
    if several_workers:
        if not torch.distributed.is_nccl_available():
            raise ValueError(f"torch {torch.__version__} lacks NCCL: install torch for CUDA")
        found += "; NCCL is available, but was not tested"
    return found


def check_compiler(mode: str, on_gpu: bool) -> str:
    """Check that torch has what it calls at run time: a C compiler and, on GPUs, Triton.

    Args:
        mode: Setting training.compile.
        on_gpu: Whether training runs on GPUs.

    Raises:
        ValueError: Either is missing.
        Note: Either is missing, but only the kernel of octic layers would use it.
    """
    from efae.model.octic.on_gpu import find_compiler  # torch takes seconds

    try:
        return find_compiler(on_gpu)
    except ValueError as error:
        if mode == "none":
            raise Note(f"install {error} on every node: exact models train faster") from error
        raise ValueError(
            f"training.compile={mode} needs {error} on every node: install it, or set"
            " --training.compile none"
        ) from error


def check_lpips(weights: str, side: int) -> str:
    """Check that LPIPS has its weights on this machine, and images that are large enough.

    Args:
        weights: Setting loss.lpips_weights.
        side: Shorter side, in pixels, of the smallest images that the loss sees.

    Raises:
        ValueError: The file is missing or holds something else, or the images are too small.
    """
    from efae.evaluation.lpips_fid import LPIPS_SMALLEST, Lpips  # torch takes seconds

    if side < LPIPS_SMALLEST:
        raise ValueError(
            f"loss.lpips_weights: a side of the smallest images in training has {side} pixels, and"
            f" LPIPS needs {LPIPS_SMALLEST}: raise data.resolution (or the sides in data.buckets),"
            " or set loss.scaling_probability=0 if it is not"
        )
    try:
        Lpips(Path(weights))
    except ValueError as error:
        raise ValueError(f"loss.lpips_weights={error}") from error
    return f"AlexNet in {weights}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
