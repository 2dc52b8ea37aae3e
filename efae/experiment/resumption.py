"""The step at which a run starts: the newest checkpoint of its name, or the one it was given."""

from data_pipelines import storage
from efae.checkpoints import checkpoint, run_folder
from efae.config import AnyConfig, Config, GeneratorConfig
from efae.config import forms as configuration


def find_start(config: AnyConfig) -> int:
    """Return the step from which the run starts or resumes; 0 without a checkpoint.

    Raises:
        ValueError: A run of this name exists and resume=never, or it has another configuration; a
            sweep has the name; or the checkpoint that resume names does not fit. The message lists
            the settings.
        CheckpointError: All checkpoints of the run, or the one that resume names, are damaged.
        StorageError: The storage refuses or does not answer.
    """
    name = config.tracking.run_name
    newest = run_folder.read_newest_origin(run_folder.locate_run(config))
    if newest is not None:
        uri, (metadata, found) = newest
        if config.resume == "never":
            raise ValueError(
                f"resume=never, but run {name!r} exists, at step {metadata['step']} ({uri});"
                " choose another tracking.run_name, or resume it with --resume auto"
            )
        if type(found) is not type(config):
            raise ValueError(
                f"tracking.run_name={name!r}: that run trains another kind of model; choose another"
                " name"
            )
        changes = configuration.list_changes(found, config)
        changed = [line for key, line in changes if configuration.binds_run(key)]
        if changed:
            raise ValueError(
                f"tracking.run_name={name!r}: that run has another configuration"
                f" ({'; '.join(changed)}); choose another name (with --resume {uri} the new run"
                " starts where this one is), or the settings it started with"
            )
        return metadata["step"]
    if storage.exists(run_folder.locate_run(config) / run_folder.SWEEP):
        raise ValueError(f"tracking.run_name={name!r}: a sweep has that name; choose another")
    if config.resume in ("auto", "never"):
        return 0
    metadata, found = checkpoint.read_origin(config.resume)
    if type(found) is not type(config):
        raise ValueError(f"resume={config.resume!r}: that checkpoint is of another kind of model")
    fixed = ("model.", "representation.", "data.uri", "data.channels", "data.buckets")
    fixed += ("training.seed", "training.global_batch_size", "flow.prediction")
    fixed += ("flow.distill_from", "start.", "generator.", "data.classes", "data.format")
    if isinstance(config, Config) and config.model.kind == "transformer":
        fixed += ("data.resolution",)  # its positions are those of one size
    if (config.flow.condition_drop > 0) != (found.flow.condition_drop > 0):
        fixed += ("flow.condition_drop",)  # a null condition has weights
    if 0 in [kind.data.views for kind in (config, found) if isinstance(kind, GeneratorConfig)]:
        fixed += ("data.views",)  # only with views does the network have weights for elements
    changes = configuration.list_changes(found, config)
    changed = {key: line for key, line in changes if key.startswith(fixed)}
    if changed:
        remedy = "use the same settings"
        free = ("data.uri", "data.buckets", "training.")
        ours = isinstance(config, Config) and not (
            config.start.is_diffusers or config.flow.distill_from
        )
        if ours and all(key.startswith(free) for key in changed):
            remedy += f", or begin with its weights alone: --start.model {config.resume}"
        raise ValueError(
            f"resume={config.resume!r}: that checkpoint was trained with other settings"
            f" ({'; '.join(changed.values())}); its weights, or its position in the data, would be"
            f" meaningless here: {remedy}"
        )
    if metadata["step"] >= config.training.steps:
        raise ValueError(
            f"training.steps={config.training.steps}: the checkpoint {config.resume} is already at"
            f" step {metadata['step']}; raise training.steps"
        )
    return metadata["step"]
