"""Run one pipeline in this process and print its measurements as one line of JSON.

The process opens the set, which is not timed, prints "ready" and waits for a line, so that several
ranks start together. CPU seconds include those of all descendants.
"""

import importlib
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.loaders import PIPELINES, Task

STEPS = 40
"""Training steps over which the wait for data is measured."""


def count_cpu_seconds() -> float:
    """Return the CPU seconds of this process, its ended children and its live descendants."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:  # it ended: its parent's seconds include it
            continue
    return total


def check_batch(images: Any, task: Task) -> int:
    """Return the number of images of a batch.

    Raises:
        ValueError: The images are not uint8 RGB of the task's size.
    """
    batch = np.asarray(images)
    if batch.dtype != np.uint8 or batch[0].size != 3 * task.side**2:
        raise ValueError(f"{batch.dtype} {batch.shape}: not uint8 RGB of {task.side} px")
    return len(batch)


def measure_epoch(read_epoch: Any, task: Task) -> dict[str, float]:
    """Measure the wall-clock and CPU seconds of one epoch, including its first batch."""
    images, wall, cpu = 0, time.perf_counter(), count_cpu_seconds()
    for batch in read_epoch():
        images += check_batch(batch, task)
    return {
        "images": images,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": count_cpu_seconds() - cpu,
    }


def measure_wait(read_epoch: Any, task: Task, step_seconds: float) -> dict[str, float]:
    """Measure the share of its time that training waits for batches after the first one."""
    matrix = torch.ones(256, 256)
    torch.set_num_threads(1)
    batches = iter(read_epoch())
    check_batch(next(batches), task)
    waited, steps, started = 0.0, 0, time.perf_counter()
    while steps < STEPS:
        # The step is a fixed amount of CPU time, however many threads share the core.
        end = time.thread_time() + step_seconds
        while time.thread_time() < end:
            matrix @ matrix
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        steps += 1
    seconds = time.perf_counter() - started
    return {"steps": steps, "wait_fraction": waited / seconds, "step_seconds": seconds / steps}


def main() -> None:
    """Run one action; the arguments are pipeline, task as JSON, action, argument of the action."""
    name, text, action = sys.argv[1:4]
    task, pipeline = Task(**json.loads(text)), PIPELINES[name]
    module = importlib.import_module(f"benchmarks.loaders.{pipeline.module}")
    if action == "write":
        module.write_set(task)
        return
    started = count_cpu_seconds()
    read_epoch = module.open_epochs(task, **pipeline.options)
    opening = count_cpu_seconds() - started
    if task.warm:
        for _ in read_epoch():
            pass
    print("ready", flush=True)
    sys.stdin.readline()
    if action == "wait":
        found = measure_wait(read_epoch, task, float(sys.argv[4]))
    else:
        found = {**measure_epoch(read_epoch, task), "opening_cpu_seconds": opening}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
