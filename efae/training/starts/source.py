"""The model that a run starts from: a teacher, one of ours, or an autoencoder of diffusers.

The driver copies it into the run's folder before the first checkpoint. Workers read it there: it is
within their reach, and what its URI names may change later.
"""

import json
from typing import Any

import torch

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.checkpoints.checkpoint import read_manifest, read_model
from efae.checkpoints.run_folder import find_newest_checkpoint, locate_run
from efae.config import AnyConfig, Config
from efae.config.forms import flatten, list_changes, with_overrides, write_option
from efae.evaluation.fitted_action import FittedAction
from efae.exchange.diffusers_tokenizer import PREFIX, read_architecture, read_pretrained
from efae.model.autoencoder import Autoencoder
from efae.model.networks import diffusers_vae
from efae.model.pretrained import StoredModel, pack_model, parse_config
from efae.model.stored_files import EMA, MANIFEST, MODEL, OWN_CONFIG, WEIGHTS
from efae.tracking.redaction import redact
from efae.tracking.server import Server
from efae.training.process import Process
from efae.training.starts.distillation import read_teacher
from efae.training.state import TrainState


def has_source(config: Config) -> bool:
    """Return whether a run starts from another model."""
    return bool(config.flow.distill_from or config.start.model)


def needs_source(config: Config) -> bool:
    """Return whether every step needs the model that the run started from."""
    return bool(config.flow.distill_from or config.start.anchor_weight)


def needs_fit(config: Config) -> bool:
    """Return whether the action on the channels of a pretrained latent is still to be fitted."""
    fitted = config.start.is_diffusers and config.start.action == "fitted"
    return fitted and config.representation.multiplicities is None


def adopt_pretrained(config: Config) -> Config:
    """Return the configuration with what follows from the autoencoder of diffusers it starts from.

    These are its architecture, the latent's channels, the pixels per cell and the action on the
    channels. A run that has begun has them in its copy. One of our models changes nothing: its
    settings are the run's, or `check_start` refuses them.

    Raises:
        ValueError: There is no such autoencoder, or the configuration does not fit it; the message
            names all settings that differ.
        StorageError: The storage refuses or does not answer.
    """
    uri = config.start.model
    if not config.start.is_diffusers:
        if config.model.kind == "diffusers":
            raise ValueError(
                f"start.model={uri!r}: name an autoencoder: --start.model diffusers:PATH"
            )
        return config
    counts, basis = config.representation.multiplicities, config.representation.learned_basis
    # Before its first checkpoint a run starts anew: the folder may have changed since.
    begun = find_newest_checkpoint(locate_run(config)) is not None
    copied = _read_copied_config(config) if begun else None
    if copied:
        architecture = json.loads(copied.start.architecture)
    else:
        architecture = read_architecture(uri.removeprefix(PREFIX))
    if copied and needs_fit(config) and _has_fit(copied, config):
        counts, basis = copied.representation.multiplicities, True
    try:
        colours, channels, f = diffusers_vae.describe(architecture)
    except ValueError as error:
        raise ValueError(f"start.model={uri} {error}") from error
    if counts is None and config.start.action == "spatial":
        counts = (channels, 0, 0, 0, 0)
    faults: list[str] = []
    if colours != config.data.channels:
        faults.append(f"data.channels={config.data.channels}: its images have {colours} colours")
    if counts is not None and sum(counts) + counts[-1] != channels:
        faults.append(f"representation.multiplicities={counts}: its latents have {channels}")
    precisions = (config.training.precision, config.training.evaluation_precision)
    if "fp16" in precisions and architecture.get("force_upcast"):
        faults.append(
            "fp16 as training.precision or training.evaluation_precision: its config.json has"
            " force_upcast, because its activations overflow there; use bf16, or set force_upcast"
            " to false if they do not"
        )
    if any(side % f for side in config.data.image_size):
        faults.append(f"data.resolution={config.data.resolution}: must be a multiple of {f}")
    if faults:
        raise ValueError(f"start.model={uri} does not fit: {'; '.join(faults)}")
    settings: dict[str, Any] = {
        "start.architecture": json.dumps(architecture, sort_keys=True),
        "representation.dim": channels,
        "representation.multiplicities": counts,
        "representation.learned_basis": basis,
        "model.downsampling": f,
        "model.patch_size": min(config.model.patch_size, f),
    }
    if config.model.kind == "diffusers":
        settings["flow.sampler_steps"] = 1
    return with_overrides(config, settings)


def _has_fit(copied: Config, config: Config) -> bool:
    """Return whether a run's copy has the basis of an action that was fitted for its group."""
    fitted = copied.start.action == "fitted" and copied.representation.learned_basis
    return fitted and copied.representation.group == config.representation.group


def read_source(config: Config, server: Server) -> StoredModel:
    """Read the model that a run started from, or before the first checkpoint what will be copied.

    Args:
        config: Configuration of the run, as `adopt_pretrained` returns it.
        server: MLflow server, for a model in its registry.

    Raises:
        ValueError: There is no such model, or it does not fit the configuration.
        CheckpointError: The model is damaged.
        ConnectionError: MLflow fails.
        StorageError: The storage refuses or does not answer.
    """
    if find_newest_checkpoint(locate_run(config)):
        return read_model(locate_copy(config).uri)
    if config.flow.distill_from:
        return read_teacher(config, server)
    if config.start.is_diffusers:
        return read_pretrained(config)
    from efae.registry import pull  # MLflow takes two seconds

    stored = pull.read(config.start.model, server)
    check_start(config, stored.config)
    return stored


def check_start(config: Config, found: Config) -> None:
    """Check that the weights of one of our models fit a run.

    Args:
        config: Configuration of the run.
        found: Configuration of the model.

    Raises:
        ValueError: They do not; the message lists all settings that differ, and the options.
    """
    where = f"start.model={config.start.model!r}"
    if found.start.is_diffusers:
        raise ValueError(
            f"{where}: its encoder is one of diffusers; name that one: --start.model"
            f" {found.start.model}, or the model itself as diffusers:FOLDER if it was fine-tuned"
        )
    if found.model.has_linear_start and found.flow.distill_from:
        raise ValueError(
            f"{where}: it was distilled into one step, for which its decoder takes x_t otherwise"
            f" than that of a new run; name its teacher: {found.flow.distill_from}"
        )
    fixed = ("model.", "representation.", "data.channels", "flow.prediction")
    if config.model.kind == "transformer":
        fixed += ("data.resolution",)
    if (config.flow.condition_drop > 0) != (found.flow.condition_drop > 0):
        fixed += ("flow.condition_drop",)  # a null condition has weights
    changes = {
        key: line
        for key, line in list_changes(found, config)
        if key.startswith(fixed) and key != "model.latent_noise"
    }
    if not changes:
        return
    settings = flatten(found)
    tied = ""
    if "data.resolution" in changes:
        tied = "; the learned positions of a transformer are those of one size, a unet takes any"
    raise ValueError(
        f"{where}: its weights belong to other settings ({'; '.join(changes.values())}){tied}; give"
        f" {' '.join(write_option(key, settings[key]) for key in changes)}"
    )


def adopt_action(config: Config, action: FittedAction) -> Config:
    """Return the configuration of a run with a fitted action; its copy of the model has the basis.

    Args:
        config: Configuration of the run, as `adopt_pretrained` returns it.
        action: Action on the latents of the pretrained autoencoder.

    Raises:
        ValueError: The action has fewer invariant channels than the image has colours.
        CheckpointError, StorageError: As in `read_source`.
    """
    fitted = action.representation
    counts = tuple(fitted.multiplicities.values())
    config = with_overrides(
        config,
        {"representation.multiplicities": counts, "representation.learned_basis": True},
    )
    stored = read_pretrained(config)
    model = Autoencoder.restore(stored)
    assert model.basis is not None
    matrix = action.basis.clone()
    if torch.linalg.det(matrix) < 0:  # the sign of an invariant channel is free
        matrix[:, fitted.blocks["a1"].start] *= -1
    model.basis.set_matrix(matrix)
    write_copy(config, pack_model(model.state_dict(), model.config, model.representation))
    return config


def copy_source(config: Config, server: Server) -> None:
    """Copy the model that a run starts from into its folder, before the first checkpoint.

    Raises:
        ValueError, CheckpointError, ConnectionError, StorageError: As in `read_source`.
    """
    if not has_source(config) or find_newest_checkpoint(locate_run(config)):
        return
    fitted = config.start.action == "fitted" and not needs_fit(config)
    if fitted and config.representation.learned_basis and _read_copied_config(config):
        return  # `adopt_action` has written it, with the basis
    write_copy(config, read_source(config, server))


def write_copy(config: AnyConfig, stored: StoredModel) -> None:
    """Write a model into the folder of a run, where its workers read it.

    Raises:
        StorageError: The storage refuses or does not answer.
    """
    folder = locate_copy(config)
    storage.delete(folder / MANIFEST)  # the copy stays incomplete while we write
    for name, data in stored.files.items():  # the manifest is last
        storage.write_bytes(folder / name, data)


def describe_source(config: Config) -> dict[str, str]:
    """Return URI and digest of the copied model, for the records of a run; {} if there is none.

    Raises:
        CheckpointError: The copy is missing or damaged.
        StorageError: The storage refuses or does not answer.
    """
    if not has_source(config):
        return {}
    files = read_manifest(locate_copy(config).uri)["files"]
    weights = next(name for name in (WEIGHTS, EMA, MODEL) if name in files)
    uri = config.flow.distill_from or config.start.model
    return {"source": redact(uri), "source_digest": files[weights]["sha256"]}


def load_source(config: Config, process: Process) -> Autoencoder:
    """Load the model that a run started from, out of the run's folder.

    What steps need is on the device: a teacher, or the encoder of an anchor.

    Raises:
        CheckpointError: It is missing or damaged.
        StorageError: The storage refuses or does not answer.
    """
    source = Autoencoder.restore(read_model(locate_copy(config).uri)).float()
    if config.flow.distill_from:
        return source.to(process.device)
    if config.start.anchor_weight:  # needs no more than this network in every step
        source.encoder.to(process.device)
    return source


def start_from(state: TrainState, source: Autoencoder) -> None:
    """Set the weights of a state before its first step to those of another model.

    A student's decoder of other sizes begins with random weights, beside the teacher's linear path,
    if any.
    """
    found, model = source.state_dict(), state.model
    weights = model.state_dict()
    same = all(name in found and found[name].shape == w.shape for name, w in weights.items())
    decoder = ("decoder.",) if same else ("decoder.linear_path.", "decoder.residual_power")
    kept = ("encoder.", "bottleneck.", "basis.", *decoder)
    weights |= {name: w for name, w in found.items() if name in weights and name.startswith(kept)}
    model.load_state_dict(weights)
    state.average.load({name: p.detach() for name, p in model.named_parameters()})


def _read_copied_config(config: Config) -> Config | None:
    """Return the configuration of the pretrained model that a run has copied; None if none."""
    file = locate_copy(config) / OWN_CONFIG
    if not (storage.exists(locate_copy(config) / MANIFEST) and storage.exists(file)):
        return None
    found = parse_config(file.uri, storage.read_bytes(file))
    return found if found.start.model == config.start.model else None


def locate_copy(config: AnyConfig) -> Location:
    """Return the folder of a run's copy of the model that it started from."""
    return locate_run(config) / "source"
