"""Measure tokenizers on a shard set and write their report card.

    python jobs/evaluate.py --model models:/efae@champion --data s3://efae-data/openmoji-32/held_out
    python jobs/evaluate.py --model models:/efae@champion diffusers:/models/sd-vae --data ...
    python jobs/evaluate.py --model models:/efae@champion --data ... --angles 15 30 45
    python jobs/evaluate.py --model diffusers:/models/sd-vae --data ... --fit-action

Several models are measured on the same images and shown side by side; each gets its own card in a
folder below. Addresses come from the environment (`source .local/env` for the local stack).
"""

import copy
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from data_pipelines.commands import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from efae.config import Config
    from efae.exchange.onnx_export import Tokenizer
    from efae.preflight.driver_checks import SetFacts


@dataclass
class Arguments:
    """Models, images and options of an evaluation."""

    model: tuple[str, ...]
    """One or more models: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or a model folder,
    local or remote; or diffusers:PATH, a folder, local or remote, with an AutoencoderKL,
    AutoencoderTiny or AutoencoderDC of diffusers (config.json and
    diffusion_pytorch_model.safetensors)."""
    data: str
    """URI of a shard set that no model was trained on."""
    output: str = "report"
    """Folder or URI for report.html, summary.json, evaluation.json and the figures."""
    images: int = 512
    """Maximum number of images."""
    resolution: int | tuple[int, int] | None = None
    """Side of square images, or height and width, in pixels: a multiple of the side of the models'
    cells. Larger images are scaled until their shorter side fits, and cropped; smaller ones of a
    set of mixed sizes are enlarged. By default the images' own size, the same for all."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "cpu"
    """Torch device: cpu or cuda."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision that our models run in; measures are always taken in fp32, and so are models of
    diffusers."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """Compile the blocks of our models; auto = on GPUs. Every shape takes seconds at first;
    choose a --batch-size that is a power of two."""
    symmetrize: bool = False
    """Average the models over the group (E(x) = mean of rho(g)^-1 E(gx), likewise the decoder),
    which makes any of them exactly equivariant, and as many times slower as it has elements; one of
    diffusers over all flips and quarter turns, which move the cells of its latent."""
    tile: int | None = None
    """Side, in pixels, of the overlapping squares of an image in which our models compute, to bound
    their memory; with attention the result is an approximation. Models of diffusers take none."""
    angles: tuple[float, ...] = ()
    """Additional rotations to measure, in degrees counter-clockwise; by default none, or for square
    images a fixed list if the model was trained on rotations by any angle
    (loss.rotation_probability)."""
    page: bool = False
    """Also write the page that flips latents in a browser, with all models, into the folder page
    below --output. Takes a minute per model; needs npm and the extra onnx."""
    fit_action: bool = False
    """Also find the representation that the channels of each latent already carry."""
    lpips_weights: Path | None = None
    """AlexNet weights of torchvision, alexnet-owt-7be5be79.pth, to measure LPIPS too."""
    fid_weights: Path | None = None
    """Inception weights of torch-fidelity, to measure FID too; needs the packages torch-fidelity
    and torchvision."""


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if the report was written."""
    chosen = tyro.cli(Arguments, description=__doc__, args=arguments, prog="jobs/evaluate.py")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from data_pipelines import storage
    from data_pipelines.storage import Location
    from efae.checkpoints.checkpoint import CheckpointError

    with tempfile.TemporaryDirectory() as temporary:
        try:
            output = Location.parse(chosen.output)
            if output.path is None:
                storage.check_writable(output)
            folder = output.path or Path(temporary)
            models = _run(chosen, folder)
            if output.path is None:
                storage.upload_folder(folder, output)
        except (ValueError, OSError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        _print_table(json.loads((folder / "summary.json").read_text()))
        print(f"report: {output / 'report.html'}")
        if chosen.page:
            try:
                _write_page(folder / "page", models)
                if output.path is None:
                    storage.upload_folder(folder / "page", output / "page")
            except Exception as error:  # of torch, ONNX Runtime or protobuf, too
                reason = str(error) or type(error).__name__
                print(f"error: the page was not written: {reason}", file=sys.stderr)
                return 1
    return 0


def _run(chosen: Arguments, folder: Path) -> "Mapping[str, Tokenizer]":
    """Check the input, measure every model, write the report into `folder`, and return the models.

    Raises:
        ValueError: The user's input cannot work.
    """
    from tqdm import tqdm

    from efae.evaluation.any_angle import choose_angles
    from efae.evaluation.evaluate import evaluate, measure_drift
    from efae.evaluation.fitted_action import fit_action
    from efae.evaluation.lpips_fid import Lpips, load_fid
    from efae.evaluation.measures import check_size
    from efae.model.autoencoder import Autoencoder
    from efae.model.precision import check_device
    from efae.model.pretrained import hash_tensors
    from efae.preflight.driver_checks import read_facts
    from efae.report.card import Card, advise_on_linear_map, write_comparison, write_report

    if not chosen.model or len(set(chosen.model)) < len(chosen.model):
        raise ValueError(f"--model {' '.join(chosen.model)}: name one or more, each once")
    if chosen.images < 1 or chosen.batch_size < 1:
        raise ValueError("--images and --batch-size must be positive")
    check_device(chosen.device, f"--device {chosen.device}")
    lpips = Lpips(chosen.lpips_weights).to(chosen.device) if chosen.lpips_weights else None
    if chosen.fid_weights:
        load_fid(chosen.fid_weights)
    found = read_facts(chosen.data)
    size, credits = _choose_size(found, chosen), [found.credit] if found.credit else []
    if chosen.page:
        from efae.web_page.page import check_page

        check_page()
    check_size(*size)
    if lpips is not None:
        lpips.check_size(*size)
    colours = found.shape and found.shape[0]
    loaded = {uri: _load(uri, colours, size, chosen) for uri in chosen.model}
    for uri, (model, _, _) in loaded.items():
        try:
            choose_angles(model, chosen.angles or None, *size)
        except ValueError as error:
            raise ValueError(f"--angles: {uri}: {error}") from error
    images = {channels: _read(chosen, channels, size) for _, _, channels in loaded.values()}
    if chosen.fit_action and min(map(len, images.values())) < 2:
        raise ValueError(
            "--fit-action takes two images or more: it compares latents with their mean"
        )

    first, _, first_channels = loaded[chosen.model[0]]
    cards: dict[str, Card] = {}
    for uri, (model, config, channels) in loaded.items():
        started = time.monotonic()
        evaluation = evaluate(
            model,
            images[channels],
            seed=chosen.seed,
            batch_size=chosen.batch_size,
            angles_degrees=chosen.angles or None,
            lpips=lpips,
            fid=load_fid(chosen.fid_weights, chosen.device) if chosen.fid_weights else None,
            progress=lambda items, what: tqdm(items, what, disable=not sys.stderr.isatty()),
        )
        numbers = evaluation.numbers()
        if chosen.fit_action:
            invariant = min(channels, model.representation.dim)  # as training fits it
            fitted = fit_action(
                model, images[channels], chosen.batch_size, chosen.device, invariant
            )
            numbers["fitted_action"] = fitted.numbers()
        if uri != chosen.model[0] and channels == first_channels:
            numbers["drift"] = measure_drift(model, first, images[channels], chosen.batch_size)
        facts = {
            "model_uri": uri.removeprefix("diffusers:"),
            "data": found.describe(),
            "device": chosen.device,
            "precision": "fp32" if config is None else chosen.precision,
            "wall_seconds": time.monotonic() - started,
            "credits": credits,
        }
        if isinstance(model, Autoencoder):
            facts["tensors_sha256"] = hash_tensors(model.state_dict())
        cards[uri] = Card(numbers, evaluation.pictures, config, facts)
        if advice := advise_on_linear_map(cards[uri].numbers, config):
            print(f"warning: {uri}: {advice}", file=sys.stderr)
    if len(cards) > 1:
        facts = {"data": found.describe(), "credits": credits}
        write_comparison(folder, cards, facts)
    else:
        (card,) = cards.values()
        write_report(
            folder,
            numbers=card.numbers,
            pictures=card.pictures,
            config=card.config,
            facts=card.facts,
        )
    return {uri: model for uri, (model, _, _) in loaded.items()}


def _write_page(folder: Path, models: "Mapping[str, Tokenizer]") -> None:
    """Write the page of the models that were measured, which compute in fp32 there."""
    from efae.model.autoencoder import Autoencoder
    from efae.web_page.page import ShownModel, write_page

    shown: list[ShownModel] = []
    for uri, measured in models.items():
        model = copy.deepcopy(measured.to("cpu"))  # a copy's blocks are not compiled
        if isinstance(model, Autoencoder):
            model.precision = model.tile = None
        shown.append(ShownModel(uri, model))
    folder.mkdir(exist_ok=True)
    write_page(shown, folder)  # without credit: the training images are not known here


def _choose_size(found: "SetFacts", chosen: Arguments) -> tuple[int, int]:
    """Return height and width to measure at.

    Raises:
        ValueError: Images differ in size and no resolution is given, or they are smaller than it.
    """
    own = found.shape and found.shape[1:]
    if chosen.resolution is None:
        if own is None:
            raise ValueError(
                f"{chosen.data}: its images differ in size; set --resolution, or build the shards"
                " with --resolution N"
            )
        return own
    side = chosen.resolution
    height, width = size = (side, side) if isinstance(side, int) else side
    if min(size) < 1:
        raise ValueError(f"--resolution {height} {width}: must be positive")
    if own and (own[0] < height or own[1] < width):
        raise ValueError(
            f"--resolution {height} {width}: the images of {chosen.data} are {own[0]} x {own[1]}"
            " and would have to be enlarged; choose a smaller one"
        )
    return size


def _load(
    uri: str, colours: int | None, size: tuple[int, int], chosen: Arguments
) -> "tuple[Tokenizer, Config | None, Literal[1, 3]]":
    """Return the model, its configuration (None if foreign) and its number of colour channels.

    Args:
        uri: URI of the model.
        colours: Number of colour channels of the images; None if the index does not say.
        size: Height and width of the images.
        chosen: Options of the evaluation.

    Raises:
        ValueError: There is no such model, or it does not accept images of this shape.
    """
    import efae
    from efae.exchange.diffusers_tokenizer import load_diffusers
    from efae.model.execution.tiling import plan_windows

    height, width = size
    if uri.startswith("diffusers:"):
        foreign = load_diffusers(uri.removeprefix("diffusers:"), device=chosen.device)
        foreign.symmetrize = chosen.symmetrize
        takes = foreign.channels
        if chosen.tile is not None:
            raise ValueError(
                f"--tile {chosen.tile}: {uri}: networks of diffusers have attention and"
                " normalisation over the whole image; measure this one without --tile"
            )
        try:
            foreign.check_images(takes, height, width)
        except ValueError as error:
            raise ValueError(f"{uri}: {error}") from error
        model, config = foreign, None
    else:
        model = efae.load(uri, device=chosen.device, precision=chosen.precision)
        model.symmetrize = model.symmetrize or chosen.symmetrize
        config = model.config
        f = config.model.downsampling
        if height % f or width % f:
            raise ValueError(
                f"{uri}: images of {height} x {width} pixels: they are measured without padding, in"
                f" multiples of model.downsampling={f}; set such a --resolution"
            )
        takes = config.data.channels
        if chosen.tile is not None:
            model.tile = chosen.tile
            try:
                for network in (model.encoder, model.decoder):
                    plan_windows(chosen.tile, f, network.receptive_radius())
            except ValueError as error:
                raise ValueError(f"--tile: {uri}: {error}") from error
        model.compile_blocks(chosen.compile)
    if takes not in (colours or takes, 3) or takes not in (1, 3):
        raise ValueError(
            f"{uri} takes images of {takes} colours, but those of {chosen.data} have {colours}:"
            " measure it on a set with its number of colours"
        )
    return model, config, takes


def _read(chosen: Arguments, channels: Literal[1, 3], size: tuple[int, int]) -> "Tensor":
    """Return the images as uint8; grey images are repeated for a model that takes colour."""
    from efae.config import DataConfig
    from efae.evaluation.held_out import read_held_out

    data = DataConfig(held_out_uri=chosen.data, channels=channels, resolution=size)
    return read_held_out(data, chosen.images)


def _print_table(summary: dict[str, Any]) -> None:
    from efae.report.card import explain_fitted_action

    models = summary.get("models") or {summary["model_uri"]: summary}
    width = max(map(len, models))
    print(
        f"{'model':{width}}  {'PSNR':>8}  {'best linear':>11}  {'worst gap':>10}  {'group law':>9}"
    )
    for name, row in models.items():
        linear = row["linear_psnr"]
        print(
            f"{name:{width}}  {row['psnr']:5.2f} dB"
            f"  {'-' if linear is None else f'{linear:.2f} dB':>11}  {row['worst_gap_db']:7.1e} dB"
            f"  {row['group_law_error']:9.1e}"
        )
    for name, row in models.items():
        if fitted := row.get("fitted_action"):
            print(f"{name}: {explain_fitted_action(fitted)}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
