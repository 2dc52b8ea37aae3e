"""Map a function over many shards: in this process, or as Ray tasks on the nodes of a cluster.

Ray retries a task whose worker died, but not a task that raised. Tasks find credentials where
training does, in their node's environment or instance role; none are sent.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from typing import Any, TypeVar, cast

from data_pipelines.images.logs import ignore_metadata

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")

PLACES = ("auto", "ray", "here")
HELP = (
    "where to run: ray (tasks on the cluster at RAY_ADDRESS), here, or auto: ray if RAY_ADDRESS is"
    " set or this is a Ray job"
)
_PATIENCE_SECONDS = 5.0
_LAG_SECONDS = 1.0
"""Time in which Ray's view of free resources catches up with tasks that ended."""


class TaskFailed(RuntimeError):
    """Ray could not run a task: its worker did not start, or died in every retry."""


def uses_ray(on: str) -> bool:
    """Return whether `on`, one of `PLACES`, selects a Ray cluster.

    Raises:
        ValueError: The value is unknown, or RAY_ADDRESS is not set.
    """
    if on not in PLACES:
        raise ValueError(f"--on {on}: use one of {', '.join(PLACES)}")
    available = bool(os.environ.get("RAY_ADDRESS")) or _is_connected()
    if on == "ray" and not available:
        raise ValueError("--on ray: RAY_ADDRESS is not set; set it, or use --on here")
    return available and on != "here"


def run_tasks(
    function: Callable[[Shared, Job], Result],
    shared: Shared,
    jobs: Sequence[Job],
    on: str = "here",
    threads: int = 1,
    use_gpu: bool = False,
) -> Iterator[tuple[int, Result]]:
    """Yield (position of the job, function(shared, job)) for every job, as results arrive.

    Args:
        function: Module-level function of an importable module.
        shared: Argument that is sent to each node once.
        jobs: Arguments of the calls, one each.
        on: One of `PLACES`.
        threads: Concurrent calls in this process; on Ray, each task takes one CPU.
        use_gpu: Whether each task takes one GPU, too.

    Raises:
        TaskFailed: Ray could not run a task.
        Exception: The first error of a call; no further job starts.
    """
    if uses_ray(on):
        yield from _run_on_ray(function, shared, jobs, use_gpu)
    elif threads == 1:
        for number, job in enumerate(jobs):
            yield number, function(shared, job)
    else:
        pool = ThreadPoolExecutor(threads)
        try:
            yield from enumerate(pool.map(function, repeat(shared), jobs))
        finally:
            pool.shutdown(cancel_futures=True)


def _is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _run_on_ray(
    function: Callable[[Any, Any], Any], shared: Any, jobs: Sequence[Any], use_gpu: bool
) -> Iterator[tuple[int, Any]]:
    import ray

    _connect()
    task = ray.remote(_call).options(
        num_cpus=1, num_gpus=int(use_gpu), max_retries=3, name=function.__name__
    )
    needs = {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}
    everywhere = ray.put(shared)
    waiting = iter(enumerate(jobs))
    running: dict[Any, int] = {}
    # Later, these tasks may be what occupies the nodes.
    patience = None if not jobs or _has_room(needs) else _PATIENCE_SECONDS
    try:
        while True:
            room = _count_slots("GPU" if use_gpu else "CPU") - len(running)
            for number, job in islice(waiting, max(room, 0)):
                running[task.remote(function, everywhere, job)] = number
            if not running:
                return
            done = cast(list[Any], ray.wait(list(running), timeout=patience)[0])
            if not done:
                _say_waiting(needs)
            patience = None
            for reference in done:
                yield running.pop(reference), _get(reference)
    finally:
        for unfinished in running:
            ray.cancel(unfinished)


def _count_slots(resource: str) -> int:
    """Return the number of tasks to submit: two per CPU or GPU, so that autoscalers see demand."""
    import ray

    resources = cast(dict[str, float], ray.cluster_resources())  # Ray says dict[?, int]
    return max(2, 2 * int(resources.get(resource, 0)))


def _has_room(needs: Mapping[str, float]) -> bool:
    """Return whether a node has these resources free."""
    from ray._private.state import available_resources_per_node
    from ray.exceptions import RaySystemError

    give_up_at = time.monotonic() + _LAG_SECONDS
    while True:
        try:
            nodes = cast(dict[str, dict[str, float]], available_resources_per_node())
        except RaySystemError:  # a Ray client cannot ask
            return True
        if any(all(free.get(n, 0) >= v for n, v in needs.items()) for free in nodes.values()):
            return True
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.1)


def _say_waiting(needs: Mapping[str, float]) -> None:
    what = " and ".join(f"{count:g} {name}" for name, count in needs.items())
    without = ", leave out --use-gpu" if "GPU" in needs else ""
    print(
        f"waiting for a node with {what} free: the cluster is busy or scaling up; if no node is"
        f" large enough, add one{without}, or use --on here",
        file=sys.stderr,
        flush=True,
    )


def _connect() -> None:
    import ray

    if ray.is_initialized():
        return
    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]});"
            " start it, or use --on here"
        ) from error


def _get(reference: Any) -> Any:
    """Return a task's result, or raise its error without Ray's long traceback."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause: Exception = error.cause
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        raise TaskFailed(_explain(cause)) from error
    except RayError as error:
        raise TaskFailed(_explain(error)) from error


def _explain(error: Exception) -> str:
    """Shorten a Ray error to one line, with a remedy."""
    lines = str(error).strip().splitlines() or [""]
    missing = next((line for line in lines if "No module named" in line), None)
    if missing:
        return (
            f"a Ray task could not start ({missing.strip()}): install the package on every node, or"
            " submit this command with `ray job submit --working-dir .`"
        )
    return f"a Ray task failed, with all retries: {type(error).__name__}: {lines[0]}"


def _call(function: Callable[[Any, Any], Any], shared: Any, job: Any) -> Any:
    """Call the function on a node; explain files that the node does not see."""
    ignore_metadata()
    try:
        return function(shared, job)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error}, on node {socket.gethostname()}: on Ray, every node must see the files;"
            " use object storage or a shared disk, or --on here"
        ) from None
