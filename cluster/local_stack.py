"""The local stack: S3 (SeaweedFS), MLflow and a Ray head, on loopback, in one state folder.

``python -m cluster.local_stack up|down|ui|status``. `up` starts the services that are not running,
waits until each has answered a real request and writes ``env`` for the shell's `source`; `down`
stops exactly the processes that `up` started. Data and secrets stay in the folder. Two stacks run
side by side if EFAE_LOCAL_DIR and the ports EFAE_S3_PORT, EFAE_MLFLOW_PORT and
EFAE_RAY_DASHBOARD_PORT differ.
"""

import argparse
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from cluster import ports, processes
from cluster.services import SERVICES, Service, address, client_environment
from cluster.state import StackState, load, locked, state_folder, write_exports

_POLL_SECONDS = 0.2
_LOG_TAIL_LINES = 20


class StackError(Exception):
    """The stack cannot do what was requested; the message names the part, cause and remedy."""


def up(folder: Path) -> None:
    """Start the services that are not running; return once every service has answered.

    Raises:
        ValueError: A port variable does not hold a port, or two services would share one.
        StackError: A port is taken, or a service did not start; nothing that this call started
            is left running.
    """
    with locked(folder) as state:
        dead = [service for service in SERVICES if not _is_running(state, service)]
        for service in dead:
            _stop(state, service)  # A dead leader may have left children.
        _assign_ports(state, dead)
        try:
            for service in dead:
                _start(state, service)
            _wait_until_ready(state, dead)
        except BaseException:
            for service in dead:
                _stop(state, service)
            raise
        write_exports(folder / "env", client_environment(state))
    print(f"in a shell: source {shlex.quote(str(_relative(folder / 'env')))}")


def down(folder: Path) -> None:
    """Stop exactly the processes that `up` started."""
    if not (folder / "stack.json").exists():
        print(f"nothing to stop: there is no stack in {_relative(folder)}")
        return
    with locked(folder) as state:
        recorded = [service for service in SERVICES if service.name in state.processes]
        if not recorded:
            print("nothing to stop: the stack is down")
        for service in reversed(recorded):
            count = _stop(state, service)
            print(f"{service.title:<15} stopped ({count} process{'' if count == 1 else 'es'})")


def status(folder: Path) -> bool:
    """Print each service with its address or fault; return whether all services answer."""
    state = load(folder)
    faults = {service: _find_fault(state, service) for service in SERVICES}
    for service, fault in faults.items():
        print(f"{service.title:<15} {fault or address(state, service.name)}")
    return not any(faults.values())


def ui(folder: Path) -> None:
    """Print the addresses to open in a browser.

    Raises:
        StackError: The stack is not up.
    """
    if not status(folder):
        raise StackError("the stack is not up: use `make up`")
    print(f"the token for the Ray dashboard is in {_relative(load(folder).token_file)}")


def _is_running(state: StackState, service: Service) -> bool:
    record = state.processes.get(service.name)
    return record is not None and processes.is_running(record)


def _find_fault(state: StackState, service: Service) -> str:
    """Return why the service cannot be used now; empty if it can."""
    if not _is_running(state, service):
        return "down"
    try:
        service.check(state)
    except (OSError, RuntimeError) as error:
        return f"not ready: {error}"
    return ""


def _assign_ports(state: StackState, dead: Sequence[Service]) -> None:
    """Assign every port of the stack; running services keep theirs."""
    chosen: dict[int, Service] = {}
    for service in SERVICES:
        asked = ports.read_port(service.variable)
        if service in dead:
            port = asked or service.default_port
            if not ports.is_free(port):
                raise StackError(
                    f"port {port} of {service.title} is used by another program: free it, or set"
                    f" {service.variable} to another port"
                )
        else:
            port = state.ports[service.name]
            if asked not in (None, port):
                raise StackError(
                    f"{service.variable}={asked}, but {service.title} of this stack runs on port"
                    f" {port}: use `make down` first, or another EFAE_LOCAL_DIR"
                )
        if port in chosen:
            raise ValueError(
                f"{service.title} and {chosen[port].title} cannot share port {port}: set"
                f" {service.variable} or {chosen[port].variable}"
            )
        chosen[port] = service
        state.ports[service.name] = port
    hidden = [f"{service.name}.{name}" for service in dead for name in service.hidden_ports]
    taken = {port for name, port in state.ports.items() if name not in hidden}
    kept = {state.ports[name] for name in hidden if name in state.ports} - taken
    if len(kept) < len(hidden) or not all(map(ports.is_free, kept)):
        # In one call: nobody listens on a port yet, so a second call could return it again.
        free = [port for port in ports.pick_free(len(hidden) + len(taken)) if port not in taken]
        state.ports.update(zip(hidden, free, strict=False))


def _start(state: StackState, service: Service) -> None:
    sockets = state.socket_folder
    sockets.mkdir(mode=0o700, exist_ok=True)
    if sockets.stat().st_uid != os.getuid():
        raise StackError(f"{sockets} belongs to another user: use another EFAE_LOCAL_DIR")
    if service.name == "ray":  # Files of old sessions: logs, spilled objects, working folders.
        shutil.rmtree(sockets / "ray", ignore_errors=True)
    for name in ("logs", "s3", "mlflow"):
        (state.folder / name).mkdir(exist_ok=True)
    state.save()  # The token file must exist when Ray starts.
    state.processes[service.name] = processes.start(
        service.command(state), service.environment(state), _log_file(state, service)
    )
    state.save()


def _stop(state: StackState, service: Service) -> int:
    record = state.processes.get(service.name)
    if record is None:
        return 0
    count = processes.stop(record)
    del state.processes[service.name]
    state.save()
    return count


def _wait_until_ready(state: StackState, started: Sequence[Service]) -> None:
    """Wait for all services in parallel; print a line as each answers."""
    cancelled = threading.Event()

    def wait(service: Service) -> tuple[Service, float, str]:
        begin = time.monotonic()
        while True:
            running = _is_running(state, service)
            fault = _find_fault(state, service)
            seconds = time.monotonic() - begin
            if not fault or not running or cancelled.is_set() or seconds > service.start_seconds:
                return service, seconds, fault
            cancelled.wait(_POLL_SECONDS)

    with ThreadPoolExecutor(len(SERVICES)) as pool:
        try:
            for future in as_completed([pool.submit(wait, service) for service in SERVICES]):
                service, seconds, fault = future.result()
                if fault:
                    raise StackError(_describe_failure(state, service, seconds, fault))
                how = f"ready in {seconds:.1f} s" if service in started else "already up"
                print(f"{service.title:<15} {address(state, service.name)}  {how}", flush=True)
        finally:
            cancelled.set()


def _describe_failure(state: StackState, service: Service, seconds: float, fault: str) -> str:
    log = _log_file(state, service)
    tail = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "\n".join(
        [
            f"{service.title} did not start: {fault} after {seconds:.0f} s;"
            f" the end of {_relative(log)}:",
            *(f"    {line}" for line in tail),
        ]
    )


def _log_file(state: StackState, service: Service) -> Path:
    return state.folder / "logs" / f"{service.name}.log"


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="cluster.local_stack", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "ui", "status"])
    command = parser.parse_args().command
    folder = state_folder()
    try:
        if command == "status":
            return 0 if status(folder) else 1
        {"up": up, "down": down, "ui": ui}[command](folder)
    except (StackError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
