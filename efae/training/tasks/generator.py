"""Training of a generator: a flow model of the latents of one tokenizer."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines import ShardDataset, storage
from data_pipelines.images.tiles import draw_rows, draw_tile
from data_pipelines.loading.batch import Batch
from data_pipelines.loading.dataset import LatentSet
from data_pipelines.shards.index import CLASSES, LABEL
from data_pipelines.shards.latent_format import LatentFormat
from efae.checkpoints.checkpoint import read_model
from efae.checkpoints.run_folder import find_newest_checkpoint, locate_run
from efae.config import GeneratorConfig, LatentsConfig
from efae.evaluation.flow_measures import TIME_BINS
from efae.evaluation.measures import Totals, draw_noise, to_uint8
from efae.evaluation.samples import ImageSampler
from efae.generation.network import Generator, read_format
from efae.generation.normalization import Normalization
from efae.generation.objective import GeneratorObjective, LatentDraws, draw
from efae.generation.sampling import Guidance
from efae.model.autoencoder import Autoencoder
from efae.model.precision import at_precision
from efae.model.stored_files import MANIFEST
from efae.tracking.server import Server
from efae.training.micro_batches import fit_batches
from efae.training.process import Process
from efae.training.starts.source import locate_copy, write_copy
from efae.training.state import TrainState

_FITTED_LATENTS = 4096
_PICTURED, _COLUMNS = 24, 8
_BATCH_SIZE = 64


def adopt_latents(config: GeneratorConfig) -> GeneratorConfig:
    """Return the configuration with the format of its latents.

    Raises:
        ValueError: A set does not exist, or holds images; or has no labels, though data.classes
            asks for them, or labels of more classes; or the held-out latents are of another model,
            or have other classes.
        StorageError: The storage refuses or does not answer.
    """
    found = [_open(uri, config.data) for uri in (config.data.uri, config.data.held_out_uri) if uri]
    latents = found[0]
    for other in found[1:]:
        names = [each.index.provenance.get(CLASSES) for each in (latents, other)]
        if config.data.classes and all(names) and names[0] != names[1]:
            raise ValueError(
                f"data.held_out_uri={config.data.held_out_uri}: its classes are not those of"
                f" {latents.uri}, so that their numbers differ: build both with one build_shards"
                " --held-out, or from folders of the same names"
            )
        mine, theirs = (
            (form.model_digest, form.shape, form.dtype) for form in (latents.format, other.format)
        )
        if mine != theirs:
            raise ValueError(
                f"data.held_out_uri={config.data.held_out_uri}: its latents are {theirs}, those of"
                f" {latents.uri} are {mine} (model digest, shape, dtype): encode the held-out"
                " images as the training images"
            )
    return replace(config, data=replace(config.data, format=latents.format.model_dump_json()))


def _open(uri: str, data: LatentsConfig) -> LatentSet:
    storage.check_readable(uri)
    latents = ShardDataset.open(uri)
    if not isinstance(latents, LatentSet):
        fault = f"{uri} holds images: encode them first, with jobs/encode.py"
        raise ValueError(fault)  # noqa: TRY004
    if data.classes:
        try:
            latents.columns(LABEL)
        except ValueError as error:
            raise ValueError(
                f"data.classes={data.classes}: {error}; train without labels, or encode images"
                " that have them, as build_shards --labels folders makes them"
            ) from error
        names = latents.index.provenance.get(CLASSES, [])
        if len(names) > data.classes:
            raise ValueError(
                f"data.classes={data.classes}: {uri} has {len(names)} classes, of which"
                f" {names[-1]!r} is the last: set it to {len(names)}"
            )
    return latents


class GeneratorTask:
    """See `Task`.

    Args:
        config: Configuration of the run, as `adopt_latents` returns it.
    """

    def __init__(self, config: GeneratorConfig):
        self._config = config
        self._format: LatentFormat = read_format(config)
        self.members = _list_members(config.data)

    def check_source(self, source: Autoencoder | None, begins: bool) -> None:
        pass

    def begin(
        self, state: TrainState, dataset: ShardDataset, process: Process, source: Autoencoder | None
    ) -> None:
        """Fit the normalisation, on rank 0 alone, to latents from all over the set.

        These are the first batches of an epoch, whose order takes from every part of it in turn.
        """
        normalization = Normalization(self._format.representation)
        if process.rank == 0:
            loader = dataset.loader(
                global_batch_size=min(_BATCH_SIZE, len(dataset)),
                seed=self._config.training.seed,
                options=self._config.data,
            )
            batches = itertools.islice(loader, _FITTED_LATENTS // _BATCH_SIZE)
            normalization.fit(batch.latent for batch in batches)
        state.model.normalization.load_state_dict(process.agree(normalization.state_dict()))
        state.average.load({name: p.detach() for name, p in state.model.named_parameters()})

    def build_objective(
        self, model: Generator, process: Process, source: Autoencoder | None
    ) -> GeneratorObjective:
        return GeneratorObjective(model)

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, LatentDraws]:
        """See `Task.draw`.

        Raises:
            ValueError: A label is no number from 0 to data.classes - 1.
        """
        device, label = generator.device, None
        latent = batch.latent.to(device, non_blocking=True)
        if self._config.data.classes:
            label = read_labels(batch, self._config.data.classes)
            label = label.pin_memory() if device.type == "cuda" else label
            label = label.to(device, non_blocking=True)
        group, shape = self._format.group, tuple(latent.shape)
        return latent, draw(self._config, shape, label, group, generator)

    def copy_source(self, server: Server) -> dict[str, str]:
        """Copy the tokenizer, which decodes the samples of validation."""
        from efae.registry import pull  # MLflow takes two seconds

        there = storage.exists(locate_copy(self._config) / MANIFEST)
        if not (there and find_newest_checkpoint(locate_run(self._config))):
            found = pull.read_tokenizer(self._format, server, self._config.data.tokenizer)
            write_copy(self._config, found)
        return {}

    def load_source(self, process: Process, begins: bool) -> None:
        return None

    def make_validation(
        self, process: Process, show: Callable[[Path, str], None] | None
    ) -> "GeneratorValidation":
        return GeneratorValidation(self._config, process, show)


class GeneratorValidation:
    """Measures the averaged weights on held-out latents, split over the ranks, and draws samples.

    Args:
        config: Configuration of the run.
        process: This process.
        show: Function that takes a PNG file, which is removed afterwards, and a name for it; rank 0
            calls it.
    """

    def __init__(
        self, config: GeneratorConfig, process: Process, show: Callable[[Path, str], None] | None
    ):
        self._config, self._process, self._show = config, process, show
        self._tokenizer = None
        if show is not None:
            stored = read_model(locate_copy(config).uri)
            self._tokenizer = Autoencoder.restore(stored, str(process.device))
        self._held_out = _read_held_out(config, process) if config.data.held_out_uri else None
        self._batch_size = _BATCH_SIZE

    @torch.no_grad()
    def measure(self, state: TrainState) -> dict[str, float]:
        """Measure the averaged weights of `state`, and show samples.

        Returns:
            "held_out_loss", the flow loss averaged over t; nothing without held-out latents.
        """
        model = copy.deepcopy(state.model).eval()
        state.average.copy_to(model)
        device = self._process.device
        if self._config.choose_compilation(device.type) != "none":
            model.compile_blocks()
        if self._tokenizer is not None and self._show is not None:
            precision = self._config.training.evaluation_precision
            sampler = ImageSampler(model, self._tokenizer, precision=precision)
            self._draw(sampler, self._show, state.step)
        if self._held_out is None:
            return {}
        held_out = self._held_out
        totals, self._batch_size = fit_batches(
            lambda batch_size: self._measure(model, held_out, batch_size), self._batch_size
        )
        totals.gather(device)
        losses = [float(totals.mean(f"loss {i}")) for i in range(TIME_BINS)]
        return {"held_out_loss": sum(losses) / TIME_BINS}

    def _measure(self, model: Generator, held_out: "_HeldOut", batch_size: int) -> Totals:
        objective, device, totals = GeneratorObjective(model), self._process.device, Totals()
        with at_precision(self._config.training.evaluation_precision, device):
            for start in range(0, len(held_out.positions), batch_size):
                part = slice(start, start + batch_size)
                latent = held_out.latent[part]
                label = None if held_out.label is None else held_out.label[part]
                noise = draw_noise(held_out.positions[part], tuple(latent.shape[1:]), 0).to(device)
                for i in range(TIME_BINS):
                    t = torch.full((len(latent),), (i + 0.5) / TIME_BINS, device=device)
                    loss, _ = objective(latent, LatentDraws(t, noise, label))
                    totals.add(f"loss {i}", loss)
        return totals

    def _draw(self, sampler: ImageSampler, show: Callable[[Path, str], None], step: int) -> None:
        classes, guidance = self._config.data.classes, Guidance.of(self._config.flow)

        def draw(batch_size: int) -> Tensor:
            found: list[Tensor] = []
            for start in range(0, _PICTURED, batch_size):
                batch = range(start, min(start + batch_size, _PICTURED))
                labels = [i % classes for i in batch] if classes else None
                found.append(sampler.draw(batch, labels, guidance))
            return torch.cat(found)

        pixels = to_uint8(fit_batches(draw, _PICTURED)[0]).cpu()
        tiles = [draw_tile(image.expand(3, -1, -1).numpy()) for image in pixels]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{step:08d}.png"
            draw_rows(tiles, _COLUMNS).save(path)
            show(path, f"samples/{path.name}")


def read_labels(batch: Batch, classes: int) -> Tensor:
    """Return the class of each sample of a batch, on the CPU.

    Raises:
        ValueError: A label is no number from 0 to classes - 1; names the sample.
    """
    labels: list[int] = []
    for key, text in zip(batch.key, batch.members[LABEL], strict=True):
        if not (text.strip().isdigit() and int(text) < classes):
            label = text[:20].decode(errors="replace")
            raise ValueError(
                f"data.classes={classes}: sample {key!r} has the label {label!r}; labels are"
                f" numbers from 0 to {classes - 1}"
            )
        labels.append(int(text))
    return torch.tensor(labels, dtype=torch.long)


@dataclass(frozen=True)
class _HeldOut:
    """One rank's share of the held-out latents, on its device."""

    positions: Sequence[int]
    latent: Tensor
    label: Tensor | None


def _list_members(data: LatentsConfig) -> tuple[str, ...]:
    return (LABEL,) if data.classes else ()


def _read_held_out(config: GeneratorConfig, process: Process) -> _HeldOut:
    """Return this rank's share of the first held-out latents."""
    dataset = ShardDataset.open(config.data.held_out_uri)
    count = min(config.training.validation_images, len(dataset))
    loader = dataset.loader(
        global_batch_size=min(_BATCH_SIZE, count),
        options=config.data,
        shuffle=False,
        members=_list_members(config.data),
        bad_samples="fail",
    )
    latents, labels = list[Tensor](), list[Tensor]()
    for batch in itertools.islice(loader, -(-count // _BATCH_SIZE)):
        latents.append(batch.latent.float())
        if config.data.classes:
            labels.append(read_labels(batch, config.data.classes))
    first, end = (count * part // process.world_size for part in (process.rank, process.rank + 1))
    latent, label = (
        torch.cat(parts)[first:end].to(process.device) if parts else None
        for parts in (latents, labels)
    )
    assert latent is not None
    return _HeldOut(range(first, end), latent, label)
