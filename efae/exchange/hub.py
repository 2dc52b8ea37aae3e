"""Upload of folders to the Hugging Face Hub, each as one commit.

A reader of the Hub sees all files of a commit or none. A repository is only written if it is new or
empty, or holds what an earlier upload of the same kind left there. Of its files, an upload deletes
those alone that the manifests of the last one list.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from efae.model.stored_files import MANIFEST, WEIGHTS, parse_manifest
from efae.tracking.redaction import first_cause, redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "space"]
_MARKS = {"model": MANIFEST, "space": "page.json"}
"""File by whose content a repository of ours is recognised."""
PROGRAMS = "onnx"
"""Folder of the ONNX programs in a model's repository."""
_EMPTY = {".gitattributes"}
_NEW = _EMPTY | {"README.md", "LICENSE", "index.html", "style.css"}
"""Files that a repository can have from its creation, in its web form or as a static Space."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class HubOptions:
    """Repositories and card of a model on the Hugging Face Hub."""

    licence: str = ""
    """Licence of the weights as the Hub spells it, for instance apache-2.0 or cc-by-sa-4.0."""
    report: str = ""
    """Folder or URI of a report card of this model, whose numbers the model card shows."""
    space: str = ""
    """Repository, USER/NAME, of a static Space that receives the page."""
    onnx: bool = True
    """Send the ONNX programs, too; their export takes a minute of CPU."""
    private: bool | None = None
    """Whether new repositories are private; by default their owner's settings decide."""
    revision: str = "main"
    """Branch of the model's repository, created if missing."""
    commit_message: str = "Upload model"
    """Message of the commits."""
    dry_run: bool = False
    """List what would be sent, and send nothing; needs no token, and no network but for the page's
    runtime, downloaded once."""


class HubFile(NamedTuple):
    """A file for the Hub.

    Attributes:
        repository: USER/NAME of a model, or spaces/USER/NAME.
        path: Path in the repository.
        bytes: Size in bytes.
    """

    repository: str
    path: str
    bytes: int


@dataclass(frozen=True)
class HubFolder:
    """A local folder for one repository.

    Attributes:
        repo_id: Repository, USER/NAME.
        kind: Type of the repository.
        path: Local folder; all its files are sent.
        revision: Branch that receives the commit.
    """

    repo_id: str
    kind: Kind
    path: Path
    revision: str = "main"

    def list_files(self) -> list[HubFile]:
        """List the files by path."""
        repository = self.repo_id if self.kind == "model" else f"spaces/{self.repo_id}"
        return [
            HubFile(repository, path.relative_to(self.path).as_posix(), path.stat().st_size)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        ]


def check_options(repo_id: str, options: HubOptions) -> None:
    """Check repositories, licence, branch and message, without the network.

    Raises:
        ValueError: One of them is malformed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    names = [repo_id, options.space] if options.space else [repo_id]
    for name in names:
        try:
            validate_repo_id(name)
            is_valid = "/" in name
        except HFValidationError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{name!r} names no repository of the Hub: write USER/NAME, in letters, digits and"
                " single -, _ or ."
            )
    if options.licence and not _LICENCE.fullmatch(options.licence):
        raise ValueError(
            f"licence {options.licence!r}: write it as the Hub does, for instance apache-2.0,"
            " cc-by-sa-4.0 or other"
        )
    if not options.revision.strip() or not options.commit_message.strip():
        raise ValueError("the branch (revision) and the commit message must not be empty")


def find_token(token: str | None = None) -> str:
    """Return the given token, or that of the environment or of the Hub's login.

    Raises:
        ValueError: There is none, or it is malformed; the message does not repeat it.
    """
    from huggingface_hub import get_token

    found = (token or get_token() or "").strip()
    if not found:
        raise ValueError(
            "no token for the Hub: set HF_TOKEN to one that may write, or log in with"
            " `hf auth login`; a dry run needs none"
        )
    if not re.fullmatch("[!-~]+", found):
        raise ValueError(
            "the token for the Hub has a space, a line break or a character that is not ASCII:"
            " copy it again"
        )
    return found


def push_folders(
    folders: Sequence[HubFolder], token: str, commit_message: str, private: bool | None = None
) -> None:
    """Send each folder to its repository, which is created if missing, as one commit.

    Args:
        folders: Folders.
        token: Token that may write.
        commit_message: Message of the commits.
        private: Whether repositories that are created are private; None: their owner's default.

    Raises:
        ValueError: A repository holds other things; then nothing was sent.
        ConnectionError: The Hub refuses or does not answer; the message names the repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    previous = check_repositories(folders, token)
    api = HfApi(token=token)
    for folder, names in zip(folders, previous, strict=True):
        sent = {file.path: folder.path / file.path for file in folder.list_files()}
        stale = names - sent.keys()
        with _explaining(api, folder):
            api.create_repo(
                folder.repo_id,
                repo_type=folder.kind,
                private=private,
                exist_ok=True,
                space_sdk="static" if folder.kind == "space" else None,
            )
            if folder.revision != "main":
                api.create_branch(folder.repo_id, branch=folder.revision, exist_ok=True)
            api.create_commit(
                folder.repo_id,
                [
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                    *(CommitOperationAdd(name, path) for name, path in sent.items()),
                ],
                commit_message=commit_message,
                repo_type=folder.kind,
                revision=folder.revision,
            )


def check_repositories(folders: Sequence[HubFolder], token: str) -> list[set[str]]:
    """Check that each repository is new, empty or ours, and return what the last upload left there.

    Args:
        folders: Folders, which need not exist yet.
        token: Token that may write.

    Raises:
        ValueError: A repository holds other things.
        ConnectionError: The Hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    return [_list_previous(api, folder) for folder in folders]


def _list_previous(api: "HfApi", folder: HubFolder) -> set[str]:
    """Return the paths of the last upload; ValueError if the repository is not ours to write."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import hf_raise_for_status

    revision = folder.revision

    def list_files(revision: str) -> set[str]:
        # Unlike the client's other lists of files, this is one request, without retries.
        ask = api.space_info if folder.kind == "space" else api.model_info
        return {file.rfilename for file in ask(folder.repo_id, revision=revision).siblings or []}

    def read(name: str) -> bytes:
        if name not in names:
            return b""
        url = hf_hub_url(
            *(folder.repo_id, name),
            repo_type=folder.kind,
            revision=revision,
            endpoint=api.endpoint,
        )
        with _explaining(api, folder):
            answer = get_session().get(url, headers={"authorization": f"Bearer {api.token}"})
            hf_raise_for_status(answer)
            return answer.content

    with _explaining(api, folder):
        try:
            names = list_files(revision)
        except RevisionNotFoundError:  # the new branch starts at main
            revision = "main"
            names = list_files(revision)
        except RepositoryNotFoundError:
            return set()
    if ".gitignore" in names:
        raise ValueError(
            f"{folder.repo_id} has a .gitignore, for which the Hub leaves out files without a word:"
            " nothing was sent; delete it there, or choose another name"
        )
    sent = _parse_model(read) if folder.kind == "model" else _parse_page(read)
    if sent is not None:
        return sent & names
    if not names <= _EMPTY and not (names <= _NEW and _is_new(api, folder, revision)):
        others = sorted(names - _NEW) or sorted(names - _EMPTY)
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{folder.repo_id} already holds {', '.join(others[:3])}{more}, which this package did"
            " not send: nothing was sent; choose another name, or empty that repository"
        )
    return set()


def _is_new(api: "HfApi", folder: HubFolder, revision: str) -> bool:
    """Return whether nobody has changed a repository since its creation."""
    with _explaining(api, folder):
        commits = api.list_repo_commits(folder.repo_id, repo_type=folder.kind, revision=revision)
    return [commit.title for commit in commits] == ["initial commit"]


def _parse_model(read: Callable[[str], bytes]) -> set[str] | None:
    """Return the paths that the manifests of a model list; None if it is not ours."""
    try:
        files = parse_manifest("", read(_MARKS["model"]))["files"]
    except ValueError:
        return None
    return {MANIFEST, *files, *_list_programs(read, PROGRAMS)} if WEIGHTS in files else None


def _parse_page(read: Callable[[str], bytes]) -> set[str] | None:
    """Return the paths that the manifests of a page list; None if it is not ours."""
    try:
        page = json.loads(read(_MARKS["space"]))
        samples = {f"samples/{sample['file']}" for sample in page["samples"]}
        folders = [str(model["folder"]) for model in page["models"]]
        _ = page["webgpu"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return samples.union(*(_list_programs(read, folder) for folder in folders))


def _list_programs(read: Callable[[str], bytes], folder: str) -> set[str]:
    """Return the paths of ONNX programs and their manifest; none without a manifest."""
    manifest = f"{folder}/export.json"
    try:
        files: Any = json.loads(read(manifest))["files"]
        return {manifest, *(f"{folder}/{name}" for name in files)}
    except (ValueError, TypeError, LookupError, RecursionError):
        return set()


@contextmanager
def _explaining(api: "HfApi", folder: HubFolder) -> Generator[None]:
    """Turn whatever the Hub's client raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or str(error)
        hint = ": use a token that may write there" if status in (401, 403) else ""
        raise ConnectionError(
            redact(
                f"{folder.repo_id}: {api.endpoint} answers {status}"
                f" ({reason.strip().splitlines()[0]}){hint}"
            )
        ) from error
    except Exception as error:  # its HTTP client and its storage client raise their own
        raise ConnectionError(
            redact(f"{folder.repo_id}: the upload to {api.endpoint} failed ({first_cause(error)})")
        ) from error
