"""What must hold on a machine that trains; plain functions that run there, without Ray.

Importing this is cheap, because every node does it before anything else: torch and MLflow come
with the checks that need them.
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
"""For checkpoints on their way to storage, Ray's logs and metrics that wait for MLflow."""
SHARED_MEMORY_BYTES = 64 * 2**20
CLOCK_SECONDS = 300.0
"""S3 refuses signatures that are 900 s off: this leaves time to act."""
_REQUEST_SECONDS = 5.0


def list_versions() -> dict[str, str]:
    """Of Python (major and minor), torch and Ray; without torch's suffix for the kind of build."""
    found = {"python": "{}.{}".format(*sys.version_info)}
    for package in ("torch", "ray"):
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def check_versions(expected: dict[str, str]) -> str:
    """The same programs as the driver has.

    Args:
        expected: `list_versions` of the driver.

    Raises:
        ValueError: another version of one of them.
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
    """The server whose time counts: S3's, which refuses requests of another time, or MLflow's."""
    s3 = endpoint() or "https://s3.amazonaws.com"
    scheme, _, rest = (s3 if storage_uri.startswith("s3:") else server.uri).partition("://")
    host = rest.partition("/")[0].rpartition("@")[2]  # without user name and password
    return f"{scheme}://{host}" if host else ""


def check_clock(url: str) -> str:
    """This machine's clock agrees with the Date of a server's answer, to about a second.

    Args:
        url: of any HTTP server; a refusal carries a date too.

    Raises:
        ValueError: more than `CLOCK_SECONDS` apart.
        Note: no answer, or one without a date.
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
        raise Note(f"not compared: {url} does not say its time")
    # The server cut its time down to whole seconds, somewhere between request and answer.
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
    """Room for the shard cache, and `SPARE_BYTES` in the temporary folder.

    Args:
        cache_dir: data.cache_dir.
        cache_bytes: what will be in the caches at most; what already is there counts as room.

    Raises:
        ValueError: less is free.
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
    """Room in shared memory, where Ray's objects and NCCL's buffers lie.

    Args:
        required: whether training fails without it, as NCCL does.
        folder: where it is mounted.

    Raises:
        ValueError: less than `SHARED_MEMORY_BYTES` is free.
        Note: the same where it is not required: Ray then takes the temporary folder.
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
    """What the driver wrote to storage is read here: credentials reach this node, and it is shared.

    Args:
        mark: the object that the driver wrote, not empty.

    Raises:
        ValueError: it is not here.
        StorageError: denied or unreachable.
    """
    try:
        storage.read_range(mark, 0, 1, PREFLIGHT_SECONDS)
    except FileNotFoundError as error:
        raise ValueError(
            f"what the driver wrote to {mark.display.rpartition('/')[0]} is not seen from here: set"
            " ray.storage_uri to storage that all nodes share, such as s3://"
        ) from error


def check_auth(dashboard: str) -> str:
    """Ray's job API, which runs what it is sent, refuses a request without the cluster's token.

    Args:
        dashboard: its host and port, as this machine reaches it.

    Raises:
        ValueError: the request was answered.
        Note: no answer.
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
            f"whoever reaches http://{dashboard} can run programs on the cluster, no token is asked"
            " for: start every node, and every client, with RAY_AUTH_MODE=token and the same"
            " token"
        )
    if status not in (401, 403):
        raise Note(f"not checked: the dashboard at {dashboard} answered {status}")
    return f"a request without token was refused ({status})"


def check_gpus(count: int, precision: str, several_workers: bool) -> str:
    """This process can use the machine's GPUs.

    Args:
        count: GPUs that Ray gives to workers here.
        precision: training.precision.
        several_workers: whether the run has more than one, which then talk by NCCL.

    Raises:
        ValueError: fewer GPUs than `count`, one that lacks the precision, or no NCCL.
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
        found += "; NCCL is there, the run is the first to try it"
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
