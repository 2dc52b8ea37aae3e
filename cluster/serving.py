"""Single services of a stack, for callers that do not need the whole local stack."""

import time
from collections.abc import Callable, Mapping, Sequence

from cluster import ports, processes
from cluster.services import SERVICES, Service
from cluster.state import StackState

_POLL_SECONDS = 0.2


def find_service(name: str) -> Service:
    """Return the service "s3", "mlflow" or "ray"."""
    return next(service for service in SERVICES if service.name == name)


def start(
    state: StackState,
    name: str,
    options: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    place: Callable[[list[str]], list[str]] = list,
) -> None:
    """Start one service without waiting for it; record its process in `state.processes`.

    Args:
        state: State of the stack; free ports are chosen for those that it lacks.
        name: Name of the service.
        options: Options appended to its command; the last of two equal options applies.
        settings: Variables added to its environment.
        place: Function that wraps the command to run it elsewhere, such as in a namespace.
    """
    service = find_service(name)
    for folder in ("logs", name):
        (state.folder / folder).mkdir(parents=True, exist_ok=True)
    wanted = [name, *(f"{name}.{hidden}" for hidden in service.hidden_ports)]
    missing = [port for port in wanted if port not in state.ports]
    state.ports.update(zip(missing, ports.pick_free(len(missing)), strict=True))
    state.save()  # Ray reads its token from one of the saved files
    state.processes[name] = processes.start(
        place([*service.command(state), *options]),
        service.environment(state) | dict(settings or {}),
        state.folder / "logs" / f"{name}.log",
    )


def wait_until_ready(state: StackState, *names: str) -> None:
    """Wait until the started services pass their readiness checks.

    Raises:
        RuntimeError: A service is not ready in time; the message ends with its log.
    """
    for name in names:
        service = find_service(name)
        deadline = time.monotonic() + service.start_seconds
        while True:
            try:
                service.check(state)
                break
            except (OSError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    log = state.folder / "logs" / f"{name}.log"
                    tail = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{service.title}: {error}; {log} ends:\n{tail}") from error
            time.sleep(_POLL_SECONDS)
