"""Publication of a model on the Hugging Face Hub, with its card, its programs and its page."""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.exchange.hub import (
    PROGRAMS,
    HubFile,
    HubFolder,
    HubOptions,
    check_options,
    check_repositories,
    find_token,
    push_folders,
)
from efae.exchange.onnx_export import export_onnx
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import CARD, StoredModel, as_model_folder, hash_tensors
from efae.report.html import write_split
from efae.report.model_card import list_training_credits, render_model_card
from efae.web_page.page import ShownModel, write_page

_IDENTITY = re.compile(r"\((\d+ images, id \w+)\)$")
"""What `SetFacts.describe` ends with, behind the address."""


def publish(
    stored: StoredModel,
    repo_id: str,
    options: HubOptions,
    *,
    credit: str = "",
    token: str | None = None,
    compare: Sequence[ShownModel] = (),
) -> list[HubFile]:
    """Send a model to the Hub, or list what would be sent.

    Its repository receives the model folder, README.md with the model card, and the ONNX programs
    in `PROGRAMS`; `options.space` receives the page. Files of an earlier upload are replaced.

    Args:
        stored: Autoencoder, from a model folder or a checkpoint.
        repo_id: Repository, USER/NAME.
        options: Options.
        credit: Credit of the training images, for card and page.
        token: Token that may write; None: that of the environment or of the Hub's login. It is
            neither logged nor stored.
        compare: Further models for the page.

    Returns:
        The files that were sent, or with `options.dry_run` would be.

    Raises:
        ValueError: A name is malformed, there is no token, the report card is of another model, a
            package is missing, or a repository holds other things. Then nothing was sent.
        ConnectionError: The Hub refuses or does not answer.
        StorageError: The storage of the report card refuses or does not answer.
    """
    check_options(repo_id, options)
    if compare and not options.space:
        raise ValueError("a second model is shown by the page only: name a Space for it")
    restored = Autoencoder.restore(stored)
    numbers, facts = _read_report(options.report, restored)
    facts |= {
        "repo_id": repo_id,
        "revision": options.revision if options.revision != "main" else "",
        "licence": options.licence,
        "space": options.space,
        "programs": PROGRAMS if options.onnx else "",
        "credit": credit,
    }
    credits = list_training_credits(facts)
    stored = as_model_folder(stored)
    model = ShownModel(repo_id, restored, stored.digest)
    with tempfile.TemporaryDirectory() as scratch:
        folder, page = Path(scratch, "model"), Path(scratch, "page")
        folders = [HubFolder(repo_id, "model", folder, options.revision)]
        if options.space:
            folders.append(HubFolder(options.space, "space", page))
        token = "" if options.dry_run else find_token(token)
        if token:
            check_repositories(folders, token)  # first: an export takes a minute
        stored.write(folder, render_model_card(numbers, stored.config, facts))
        if options.space:
            page.mkdir()
            write_page([model, *compare], page, " ".join(credits))
            (page / CARD).write_text(_describe_space(repo_id, options), encoding="utf-8")
        if options.onnx and options.space:
            shutil.copytree(page / "models/0", folder / PROGRAMS)
        elif options.onnx:
            (folder / PROGRAMS).mkdir()
            export_onnx(model.model, folder / PROGRAMS, model.digest)
        if token:
            push_folders(folders, token, options.commit_message, options.private)
        return [file for each in folders for file in each.list_files()]


def _read_report(uri: str, model: Autoencoder) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the numbers and facts of a report card, without addresses; None and {} without one."""
    if not uri:
        return None, {}
    read: list[dict[str, Any]] = []
    for name in ("evaluation.json", "summary.json"):
        try:
            read.append(json.loads(storage.read_bytes(Location.parse(uri) / name)))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{uri} is no report card of one model: {name} is missing or not JSON; write one"
                " with jobs/evaluate.py"
            ) from error
    numbers, facts = read
    multiplicities = dict(model.representation.multiplicities)
    if numbers.get("multiplicities") != multiplicities:
        raise ValueError(
            f"{uri} is the report card of another model: its latents are"
            f" {write_split(numbers.get('multiplicities', {}))}, not {write_split(multiplicities)}"
        )
    if facts.get("tensors_sha256") != hash_tensors(model.state_dict()):  # widened, as measured
        raise ValueError(
            f"{uri} is not the report card of these weights: their tensors_sha256 is not the one in"
            " its summary.json; write a new one with jobs/evaluate.py"
        )
    if numbers["protocol"].get("symmetrize") != model.config.start.symmetrize:
        raise ValueError(
            f"{uri} was measured with another setting of symmetrize than the model that would be"
            " sent: write a new one with jobs/evaluate.py"
        )
    for name, article in (("train_data", "A"), ("held_out_data", "a"), ("data", "a")):
        identity = _IDENTITY.search(facts.pop(name, None) or "")
        facts[name] = f"{article} set of {identity[1]}" if identity else None
    # Settings such as start.model can be addresses, too.
    preset = [part for part in (facts.get("preset") or "").split("; ") if "/" not in part]
    facts["preset"] = "; ".join(preset) or None
    return numbers, {name: value for name, value in facts.items() if value is not None}


def _describe_space(repo_id: str, options: HubOptions) -> str:
    """Return README.md of a static Space."""
    settings = {
        "title": "Flip the latent",
        "emoji": "🪞",
        "colorFrom": "gray",
        "colorTo": "blue",
        "sdk": "static",
        "app_file": "index.html",
        "models": [repo_id],
        **({"license": options.licence} if options.licence else {}),
    }
    header = "".join(
        f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()
    )
    return (
        f"---\n{header}---\n\nA page that flips and turns the latents of [{repo_id}]"
        f"(https://huggingface.co/{repo_id}) in your browser.\n"
    )
