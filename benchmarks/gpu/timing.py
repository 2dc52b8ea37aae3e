"""Time, host waits and kernels of a call."""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(
    call: Callable[[], Any], device: torch.device, repeats: int = 20, warm_up: int = 3
) -> float:
    """Return the median duration of a call, by the device's own events on a GPU."""
    for _ in range(warm_up):
        call()
    wait_for(device)
    if device.type != "cuda":
        times: list[float] = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    wait_for(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long the host takes to issue a call."""
    wait_for(device)
    began = time.perf_counter()
    call()
    elapsed = (time.perf_counter() - began) * 1e3
    wait_for(device)
    return elapsed


def count_waits(call: Callable[[], Any]) -> int:
    """Return how often the host waits for the GPU in a call, as far as torch notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum("synchroniz" in str(warning.message).lower() for warning in caught)


def list_kernels(call: Callable[[], Any], longest: int = 12) -> dict[str, Any]:
    """Return the number of kernels of a call, their time, and which take the most of it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [
        (event.self_device_time_total / 1e3, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    events.sort(reverse=True)
    busy = sum(ms for ms, _, _ in events)
    return {
        "kernels": sum(count for _, count, _ in events),
        "busy_ms": round(busy, 2),
        "top_kernels": [
            {"ms": round(ms, 3), "count": count, "name": name[:120]}
            for ms, count, name in events[:longest]
        ],
    }
