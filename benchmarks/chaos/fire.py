"""A run with planned kills, submitted again whenever a kill ends its driver."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.cluster import Cluster
from cluster.services import client_environment

ROOT = Path(__file__).parents[2]
KINDS = ("worker", "raylet", "driver", "controller")
_POLL_SECONDS = 0.02
_STALL_SECONDS = 240.0


@dataclass(frozen=True)
class Kill:
    """One kill of a plan."""

    kind: str
    """Kind of process, a key of `cluster.TARGETS`."""
    moment: str
    """"training" or "checkpoint": once the run has reached `step` after the previous kill;
    "recovery": at the previous kill."""
    step: int
    """Steps that the run has started."""
    delay_seconds: float
    """Delay after the moment."""


@dataclass(frozen=True)
class Killed:
    """One kill that was executed."""

    kind: str
    moment: str
    time: float
    """Time in seconds since the epoch."""
    pid: int


def plan_kills(
    count: int, kinds: Sequence[str], steps: int, checkpoint_interval: int, seed: int
) -> list[Kill]:
    """Draw random kills, every kind equally often, spread over nine tenths of the run.

    One in four comes while a checkpoint is in progress, one in six while the run recovers from the
    previous kill.
    """
    chance = random.Random(seed)
    drawn = [kinds[index % len(kinds)] for index in range(count)]
    chance.shuffle(drawn)
    plan: list[Kill] = []
    for index, kind in enumerate(drawn):
        # No kill comes before the first checkpoint: a restart from step 0 would prove less.
        span = 0.9 * steps - checkpoint_interval
        step = checkpoint_interval + int((index + chance.random()) / count * span)
        moment = chance.choices(("training", "checkpoint", "recovery"), (7, 3, 2))[0]
        if moment == "recovery" and index:
            plan.append(Kill(kind, moment, step, chance.uniform(0, 12)))
        elif moment == "checkpoint":
            step += -step % checkpoint_interval
            plan.append(Kill(kind, moment, step, chance.uniform(0, 0.3)))
        else:
            plan.append(Kill(kind, "training", step, chance.uniform(0, 0.5)))
    return plan


class Run:
    """One run, submitted as users do, and again whenever a kill ends its driver.

    Args:
        cluster: Cluster that runs it.
        name: Name of the run in MLflow and in storage.
        options: Options of jobs/train.py.
        folder: Folder for the sample log and the output of the jobs.
    """

    def __init__(self, cluster: Cluster, name: str, options: Sequence[str], folder: Path):
        self.cluster = cluster
        self.name = name
        self.sample_log = folder / f"{name}-samples"
        self.output = folder / f"{name}.log"
        self.submissions: list[float] = []
        self.killed: list[Killed] = []
        self._command = [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit"),
            *("--working-dir", str(ROOT), "--", "python", "jobs/train.py", *options),
            *(f"--tracking.run-name={name}", f"--tracking.sample-log={self.sample_log}"),
        ]
        self._job: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Run":
        self._submit()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._job:
            self._job.kill()
            self._job.wait()

    def execute(self, plan: Sequence[Kill]) -> None:
        """Kill as planned, then wait for the end of the run.

        Raises:
            RuntimeError: The run ended before the last kill, failed without a kill, or stalled.
        """
        for kill in plan:
            if kill.moment == "recovery":
                due = time.time() + kill.delay_seconds
                self._wait(lambda due=due: time.time() >= due, f"{kill}")
            else:
                self._wait(lambda kill=kill: self._count_steps() >= kill.step, f"{kill}")
                time.sleep(kill.delay_seconds)
            self._kill(kill)
        while self._tick():
            time.sleep(_POLL_SECONDS)
        self._say("finished", self._count_steps())

    def _kill(self, kill: Kill) -> None:
        chance = random.Random(kill.step)
        while True:
            found: list[psutil.Process] = []

            def is_there(found: list[psutil.Process] = found) -> bool:
                found[:] = self.cluster.find(kill.kind)
                return bool(found)

            self._wait(is_there, f"{kill}")
            target = chance.choice(sorted(found, key=lambda process: process.pid))
            step = self._count_steps()
            try:
                moment = self.cluster.kill(kill.kind, target)
            except psutil.NoSuchProcess:
                continue
            self.killed.append(Killed(kill.kind, kill.moment, moment, target.pid))
            self._say(f"killed: {kill.kind} {target.pid} ({kill.moment})", step)
            return

    def _wait(self, is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _STALL_SECONDS
        while not is_true():
            if not self._tick():
                raise RuntimeError(f"run {self.name} ended before {what}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"run {self.name} stalled before {what}: {self._tail()}")
            time.sleep(_POLL_SECONDS)

    def _tick(self) -> bool:
        """Return whether the run continues; submit it again if its job was killed."""
        assert self._job
        status = self._job.poll()
        if status is None:
            return True
        if status == 0:
            return False
        if not self.killed or self.killed[-1].time < self.submissions[-1]:
            raise RuntimeError(f"run {self.name} failed without a kill: {self._tail()}")
        self._submit()
        return True

    def _submit(self) -> None:
        self.submissions.append(time.time())
        self._say("submitted", self._count_steps())
        with self.output.open("ab") as output:
            self._job = subprocess.Popen(
                self._command,
                env={**os.environ, **client_environment(self.cluster.state)},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _count_steps(self) -> int:
        """Return the step reached since the last kill, or -1 if no step has started since."""
        newest = max(self.sample_log.glob("*-0.jsonl"), default=None)
        if newest is None or (self.killed and _birth(newest) < self.killed[-1].time):
            return -1
        lines = newest.read_bytes()[-10_000:].split(b"\n")
        return json.loads(lines[-2])[1] + 1 if len(lines) > 1 else -1

    def _say(self, what: str, step: int) -> None:
        where = f", at step {step}" if step >= 0 else ""
        seconds = time.time() - self.submissions[0]
        print(f"{self.name} {seconds:6.1f} s  {what}{where}", flush=True)

    def _tail(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]


def _birth(log: Path) -> float:
    return int(log.name.partition("-")[0]) / 1e9
