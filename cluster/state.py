"""State folder of a local stack: ports, secrets, processes.

`stack.json` is read and written under a lock file, so that two commands cannot start one stack
twice. The secrets are random per stack and persist, because the S3 data is tied to them.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.ports import LOOPBACK
from cluster.processes import ProcessRecord

# The path of a Unix socket holds 107 bytes, of which Ray appends up to 72:
# "/ray/session_YYYY-MM-DD_hh-mm-ss_uuuuuu_PID/sockets/dash_MetricsHead".
_LONGEST_SOCKET_FOLDER = 35
_LONGEST_TMPDIR = 75
"""Longest TMPDIR: multiprocessing appends 32 bytes, "/pymp-XXXXXXXX/listener-XXXXXXXX"."""
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")
_SHORT_FOLDERS = ("/tmp", "/var/tmp")


def state_folder() -> Path:
    """Return the state folder, absolute: EFAE_LOCAL_DIR, or ``.local`` in the working folder."""
    return Path(os.environ.get("EFAE_LOCAL_DIR") or ".local").absolute()


@dataclass
class StackState:
    """Contents of `stack.json` in `folder`."""

    folder: Path
    host: str = LOOPBACK
    """Address that all services listen on. MLflow has no authentication, so on a shared network
    only loopback is safe."""
    access_key: str = field(default_factory=lambda: secrets.token_hex(10))
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20))
    ray_token: str = field(default_factory=lambda: secrets.token_hex(32))
    ports: dict[str, int] = field(default_factory=dict[str, int])
    processes: dict[str, ProcessRecord] = field(default_factory=dict[str, ProcessRecord])

    @property
    def token_file(self) -> Path:
        """File with Ray's token, for RAY_AUTH_TOKEN_PATH."""
        return self.folder / "ray_token"

    @property
    def socket_folder(self) -> Path:
        """Folder of this stack whose path is short and plain enough for Unix sockets.

        Raises:
            ValueError: No writable folder qualifies, or the path of TMPDIR is too long.
        """
        temporary = tempfile.gettempdir()
        if len(os.fsencode(temporary)) > _LONGEST_TMPDIR:
            raise ValueError(
                f"TMPDIR={temporary}: too long for the paths of sockets; set it to a path of at"
                f" most {_LONGEST_TMPDIR} bytes"
            )
        name = f"efae-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"
        places = [place for place in _SHORT_FOLDERS if os.access(place, os.W_OK)]
        for folder in (self.folder, *(Path(place) / name for place in (temporary, *places))):
            text = str(folder)
            if len(text) <= _LONGEST_SOCKET_FOLDER and _PLAIN.fullmatch(text):
                return folder
        raise ValueError(
            f"the paths of EFAE_LOCAL_DIR ({self.folder}) and TMPDIR ({temporary}) are"
            f" too long for sockets: set one of them to at most {_LONGEST_SOCKET_FOLDER - 18}"
            " characters of A-Z a-z 0-9 / . _ -"
        )

    def save(self) -> None:
        """Write `stack.json` and Ray's token, readable only by their owner."""
        write_private(self.token_file, self.ray_token)
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_private(self.folder / "stack.json", json.dumps(content, indent=2))


def load(folder: Path) -> StackState:
    """Load the stack of a state folder; create one with new secrets if there is none."""
    file = folder / "stack.json"
    if not file.exists():
        return StackState(folder)
    content = json.loads(file.read_text())
    content["processes"] = {
        name: ProcessRecord(*record) for name, record in content["processes"].items()
    }
    return StackState(folder, **content)


@contextmanager
def locked(folder: Path) -> Generator[StackState]:
    """Lock a state folder and yield its stack; other commands wait."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load(folder)


def write_exports(file: Path, environment: Mapping[str, str]) -> None:
    """Write a file for the shell's `source`, readable only by its owner."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    # A session token or profile of the user's cloud would override the keys above.
    lines.append("unset AWS_SESSION_TOKEN AWS_PROFILE\n")
    write_private(file, "".join(lines))


def write_private(file: Path, text: str) -> None:
    """Write a file with mode 600, atomically."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as output:
        output.write(text)
    partial.replace(file)
