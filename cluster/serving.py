"""Services of a stack one by one, for those that need other than the whole local stack."""

import time
from collections.abc import Callable, Mapping, Sequence

from cluster import ports, processes
from cluster.services import SERVICES, Service
from cluster.state import StackState

_POLL_SECONDS = 0.2


def find_service(name: str) -> Service:
    """The service "s3", "mlflow" or "ray"."""
    return next(service for service in SERVICES if service.name == name)


def start(
    state: StackState,
    name: str,
    options: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    place: Callable[[list[str]], list[str]] = list,
) -> None:
    """Starts one service, without waiting for it; its process is in `state.processes`.

    Args:
        state: the ports that it does not have yet are picked free.
        name: of the service.
        options: added to its command, where the last of two counts.
        settings: added to its environment.
        place: makes of a command the one that runs it elsewhere, such as in a namespace.
    """
    service = find_service(name)
    for folder in ("logs", name):
        (state.folder / folder).mkdir(parents=True, exist_ok=True)
    wanted = [name, *(f"{name}.{hidden}" for hidden in service.hidden_ports)]
    missing = [port for port in wanted if port not in state.ports]
    state.ports.update(zip(missing, ports.pick_free(len(missing)), strict=True))
    state.save()  # Ray reads its token from a file of it
    state.processes[name] = processes.start(
        place([*service.command(state), *options]),
        service.environment(state) | dict(settings or {}),
        state.folder / "logs" / f"{name}.log",
    )


def wait_until_ready(state: StackState, *names: str) -> None:
    """Returns when services that were started answer as they should.

    Raises:
        RuntimeError: one did not in time; with the end of its log.
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
                    said = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{service.title}: {error}; {log} ends:\n{said}") from error
            time.sleep(_POLL_SECONDS)
