"""Starts of worker groups: orphaned placement groups are freed, and failed starts are limited.

Ray removes a placement group only when the actor *and* the job that created it are dead
(ray-project/ray#65881), and Ray Train leaks one when its controller, or a worker, dies while the
group starts: on a full cluster nothing could start again while the driver lives. Ray Train also
retries a failing start forever and logs nothing.
"""

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray._private import state as ray_state
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    PreemptingState,
    ReschedulingState,
    RestartingState,
    RunningState,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

from data_pipelines.storage import LocationLike
from efae.checkpoints.events import record_event
from efae.config import RayConfig
from efae.tracking.redaction import first_cause

_FIRST_REPORT_SECONDS = 60.0
_POLL_SECONDS = 1.0


class TrainingFailed(RuntimeError):
    """The run cannot continue; the message names the root cause and its rank."""


@dataclass(frozen=True)
class _Reservation:
    """Resources held by a placement group, or by an actor outside of one.

    Attributes:
        id: Id of the placement group; empty for an actor.
        job_id: Id of the job that created it, hexadecimal.
        creator_id: Id of the actor that created it, hexadecimal.
        is_orphan: Whether its creator is dead and it is not detached.
        state: One of "PENDING", "PREPARED", "CREATED" or "RESCHEDULING".
        resources: Amounts by resource name.
    """

    id: bytes
    job_id: str
    creator_id: str
    is_orphan: bool
    state: str
    resources: Mapping[str, float]


class GroupStarts(ControllerCallback, WorkerGroupCallback):
    """Callback in Ray's controller: frees orphaned resources, and counts failed starts.

    Args:
        run: Folder of the run, for its events.
        settings: Placement timeout, and the number of starts in a row that may fail.
        in_sweep: Whether other runs of the same job hold nodes too, which they will free.
    """

    def __init__(self, run: LocationLike, settings: RayConfig, in_sweep: bool):
        self._run, self._settings, self._in_sweep = run, settings, in_sweep
        self._failed = 0
        self._stalled_since = self._waits_since = 0.0
        self._next_note = _FIRST_REPORT_SECONDS

    @contextmanager
    def on_worker_group_start(self) -> Generator[None]:
        """Free orphans before a start, and watch the start until all workers run."""
        me = cast(str, ray.get_runtime_context().get_actor_id())
        free_orphans(me)  # also this controller's previous group: it has one at a time
        started = threading.Event()
        threading.Thread(target=self._watch_start, args=(me, started), daemon=True).start()
        try:
            yield
        finally:
            started.set()

    def _watch_start(self, me: str, started: threading.Event) -> None:
        """Remove a group that lost a node while its workers start: Ray would wait forever."""
        lost_at: float | None = None
        while not started.wait(_POLL_SECONDS):
            mine = [group for group in _list_placement_groups() if group.creator_id == me]
            if not any(group.state == "RESCHEDULING" for group in mine):
                lost_at = None
            elif lost_at is None:
                lost_at = time.monotonic()
            elif time.monotonic() - lost_at > self._settings.placement_timeout_seconds:
                for group in mine:
                    _remove(group)
                return

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Count failed starts; Ray calls this after every iteration of its control loop.

        Raises:
            TrainingFailed: More starts in a row failed than ray.max_failures.
        """
        now = time.monotonic()
        if isinstance(current_state, RunningState | PreemptingState):
            self._failed, self._stalled_since = 0, 0.0
            return
        if not self._stalled_since:
            self._stalled_since = self._waits_since = now
            self._next_note = _FIRST_REPORT_SECONDS
        if current_state is not previous_state:
            self._waits_since = now
            if isinstance(current_state, ReschedulingState):
                error = current_state.training_failed_error
                self._note_failure(getattr(error, "controller_failure", error))
        elif isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
            # An elastic run does not start a group without free resources, and retries at once.
            time.sleep(_POLL_SECONDS / 4)
            if now - self._waits_since >= self._settings.placement_timeout_seconds:
                self._waits_since = now
                self._note_failure(None)

    def _note_failure(self, error: Exception | None) -> None:
        """Count a start that failed, or that was not tried for lack of resources."""
        seconds = time.monotonic() - self._stalled_since
        if error is None or isinstance(error, WorkerGroupStartupTimeoutError):
            workers = self._settings.fewest_workers
            missing, holders = find_shortage(self._list_wanted(workers), workers)
            if error and error.num_workers > workers and not missing:
                return  # an elastic run requests lost nodes until Ray has counted them again
            missing = (
                missing or f"{workers} workers were not placed, although resources seem to be free"
            )
            counts = not (self._in_sweep and ray.get_runtime_context().get_job_id() in holders)
            kind, what = "standstill", f"no progress for {seconds:.0f} s: {missing}"
            is_due = seconds >= self._next_note
            remedy = (
                "submit again under the same name when resources are free, or raise"
                f" ray.placement_timeout_seconds={self._settings.placement_timeout_seconds} (300"
                " if machines have to start)"
            )
        else:
            kind, what = "failure", f"workers were lost while they started: {first_cause(error)}"
            counts = is_due = True
            remedy = "check the nodes' memory, then submit again under the same name"
        self._failed += counts
        gives_up = self._failed > self._settings.max_failures
        if not (is_due or gives_up):
            return
        self._next_note = max(self._next_note, 2 * seconds)
        print(what, flush=True)
        # Storage may be unreachable: the controller must not wait for it.
        record = threading.Thread(target=record_event, args=(self._run, kind, what), daemon=True)
        record.start()
        if gives_up:
            record.join(5)
            raise TrainingFailed(
                f"{what}. {self._failed} starts of workers in a row failed, more than"
                f" ray.max_failures={self._settings.max_failures}. Nothing is lost: {remedy}"
            )

    def _list_wanted(self, workers: int) -> dict[str, float]:
        wanted = {"CPU": float(self._settings.cpus_per_worker * workers)}
        return wanted | ({"GPU": float(workers)} if self._settings.use_gpu else {})


def free_orphans(creator_id: str | None = None) -> None:
    """Remove the placement groups of this job whose creators died, and all that runs in them.

    Args:
        creator_id: Id of a living actor of this job whose groups are removed as well.
    """
    job_id = ray.get_runtime_context().get_job_id()
    for group in _list_placement_groups():
        if group.job_id == job_id and (group.is_orphan or group.creator_id == creator_id):
            _remove(group)


def find_shortage(wanted: Mapping[str, float], workers: int) -> tuple[str, set[str]]:
    """Return which resources the workers lack ("" if none), and the ids of the jobs that hold them.

    Args:
        wanted: Amounts by resource name, for all workers.
        workers: Number of workers.
    """
    total = cast(dict[str, float], ray.cluster_resources())
    free = cast(dict[str, float], ray.available_resources())
    held = [group for group in _list_placement_groups() if group.state == "CREATED"]
    held += _list_actors()
    lines: list[str] = []
    holders: set[str] = set()
    for name, amount in wanted.items():
        if free.get(name, 0) >= amount:
            continue
        by_job: dict[str, float] = {}
        for one in held:
            by_job[one.job_id] = by_job.get(one.job_id, 0) + one.resources.get(name, 0)
        by_job = {job_id: n for job_id, n in sorted(by_job.items()) if n}
        holders |= by_job.keys()
        lines.append(
            f"{workers} workers need {amount:g} {name}s, the live nodes have"
            f" {total.get(name, 0):g}, {free.get(name, 0):g} of them free"
            + "".join(f"; job {job_id} holds {n:g}" for job_id, n in by_job.items())
        )
    return ", ".join(lines), holders


# No public table of Ray says which actor created a placement group, and whether it is alive.
_tables = cast(Any, gcs_pb2)


def _list_placement_groups() -> list[_Reservation]:
    found: list[_Reservation] = []
    for data in _accessor().get_placement_group_table():
        group = _tables.PlacementGroupTableData.FromString(data)
        state = _tables.PlacementGroupTableData.PlacementGroupState.Name(group.state)
        if state == "REMOVED":
            continue
        resources: dict[str, float] = {}
        for bundle in group.bundles:
            for name, amount in bundle.unit_resources.items():
                resources[name] = resources.get(name, 0) + amount
        found.append(
            _Reservation(
                id=group.placement_group_id,
                job_id=group.creator_job_id.hex(),
                creator_id=group.creator_actor_id.hex(),
                is_orphan=group.creator_actor_dead
                and bool(group.creator_actor_id.strip(b"\xff"))
                and not group.is_detached,
                state=state,
                resources=resources,
            )
        )
    return found


def _list_actors() -> list[_Reservation]:
    """Return the live actors that hold resources outside of placement groups."""
    found: list[_Reservation] = []
    for data in _accessor().get_actor_table(None, "ALIVE"):
        actor = _tables.ActorTableData.FromString(data)
        if not actor.placement_group_id.strip(b"\xff"):
            resources = dict(actor.required_resources)
            found.append(_Reservation(b"", actor.job_id.hex(), "", False, "CREATED", resources))
    return found


def _remove(group: _Reservation) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.id)))


def _accessor() -> Any:
    return cast(Any, ray_state.state)._connect_and_get_accessor()
