"""The result of an evaluation: its numbers, their protocol, and a few pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from efae.evaluation.any_angle import summarize_rotations
from efae.evaluation.diffusability import Diffusability, summarize_diffusability
from efae.evaluation.flow_measures import STEP_COUNTS, TIME_BINS
from efae.evaluation.measures import LARGEST_PSNR, Totals, symmetric_images
from efae.evaluation.protocol import Tokenizer, has_flow
from efae.model.autoencoder import Autoencoder
from efae.model.closed_form import LARGEST_PATCH
from efae.symmetry.representation import group_law_error

if TYPE_CHECKING:
    from efae.evaluation.lpips_fid import Fid, Lpips

CHOSEN = 64
"""Largest number of images for the measures that take many decodes."""


@dataclass(frozen=True)
class Pictures:
    """A few held-out examples for figures; images (n, c, h, w) in [-1, 1]."""

    original: Tensor
    reconstruction: Tensor
    acted: dict[str, Tensor]
    """Decodes of act(g, z), by element."""
    states: list[tuple[float, Tensor]]
    """States (t, x_t) of the first examples, from noise to image; only of an `Autoencoder`."""


def join_pictures(batches: Sequence[Pictures]) -> Pictures:
    """Return the pictures of several batches as those of one."""
    moving = [pictures.states for pictures in batches if pictures.states]
    return Pictures(
        torch.cat([pictures.original for pictures in batches]),
        torch.cat([pictures.reconstruction for pictures in batches]),
        {
            name: torch.cat([pictures.acted[name] for pictures in batches])
            for name in batches[0].acted
        },
        [
            (moments[0][0], torch.cat([state for _, state in moments]))
            for moments in zip(*moving, strict=True)
        ],
    )


@dataclass(frozen=True)
class Part:
    """What was measured on a part of the images."""

    totals: Totals
    image_shape: tuple[int, ...]
    pictures: Pictures
    """Pictures of the first images of the part."""
    closed_form_split: Mapping[str, int] | None
    """Multiplicities of the best linear map, see `LinearReference`; None if not measured."""
    seconds: float


def join_parts(parts: Sequence[Part]) -> Part:
    """Return the parts of one set as a whole, with the pictures of the first that has images.

    Args:
        parts: Parts, some of them empty if there are fewer images; the first one's totals change.
    """
    first, *others = parts
    for part in others:
        first.totals.merge(part.totals)
    shown = next((part for part in parts if len(part.pictures.original)), first)
    return replace(first, pictures=shown.pictures, seconds=max(part.seconds for part in parts))


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one model on one held-out set; PSNR and gaps in dB."""

    images: int
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    representation: str
    multiplicities: dict[str, int]
    """Multiplicity of each irrep."""
    psnr: float
    ssim: float
    linear_psnr: float | None
    """PSNR of the best equivariant linear map to the same representation, or to the best split for
    a foreign model; this and the two below are None if there is none, see `protocol`."""
    linear_ssim: float | None
    closed_form_split: dict[str, Any] | None
    """Split of as many channels whose linear map has the least squared error: its "multiplicities"
    and its "linear_psnr"."""
    psnr_by_element: dict[str, float]
    ssim_by_element: dict[str, float]
    gap_db: dict[str, float]
    worst_gap_db: float
    """The largest |gap|."""
    symmetric_gap_db: dict[str, float]
    """Worst gap on images made exactly symmetric, by the kind of symmetry."""
    symmetric_worst_gap_db: float
    half_scale_psnr: float | None
    """PSNR of the decoded latent at half its size against the image at half its size; None if a
    side of the latent is odd."""
    deterministic: bool
    """Whether decodes ignore the noise."""
    noise_floor_db: float | None
    """PSNR between two decodes of one latent from different noise; None if deterministic."""
    encoder_error: dict[str, float]
    """E |E(gx) - rho(g) E(x)|^2 / Var E(x), by element."""
    encoder_error_by_irrep: dict[str, dict[str, float]]
    """Encoder error on the channels of each irrep alone, by irrep and element."""
    decoder_error_db: dict[str, float]
    """PSNR of D(rho(g) z; g eps) against g D(z; eps), by element."""
    group_law_error: float
    energy_by_irrep: dict[str, float]
    """Share of each irrep in the latent's energy."""
    diffusability: Diffusability
    """How easily a diffusion model should learn the latents."""
    sampler_steps: int | None
    psnr_by_steps: dict[int, float]
    """PSNR by number of sampler steps; this and the two below are empty without a flow."""
    ssim_by_steps: dict[int, float]
    sharpness_by_steps: dict[int, float]
    """Gradient energy of the samples divided by that of the images."""
    loss_by_time: list[float] | None
    """Flow loss in equal bins of t over [0, 1]; None without a flow."""
    velocity_error_by_time: list[float] | None
    """|v(g x_t, t, rho(g) z) - g v(x_t, t, z)|^2 / |v|^2 for the worst g, in the same bins."""
    rotations: dict[float, dict[str, float]]
    """Errors by angle in degrees, see `summarize_rotations`; empty if not measured."""
    lpips: float | None
    """LPIPS of reconstructions; this and the three below are None without weights."""
    lpips_by_element: dict[str, float] | None
    fid: float | None
    """FID of reconstructions against the images themselves."""
    interpolated_fid: float | None
    """FID of decodes half-way between the latents of neighbours against the images."""
    protocol: dict[str, Any]
    """Everything needed to repeat the measurement."""
    seconds: float
    pictures: Pictures = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        """Return all fields except the pictures, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "pictures"}


def summarize(
    model: Tokenizer,
    whole: Part,
    angles: Sequence[float],
    *,
    protocol: dict[str, Any],
    fids: tuple[float | None, float | None],
) -> Evaluation:
    """Turn the totals of all images into the numbers.

    Args:
        model: Tokenizer that was measured.
        whole: Totals over all images, and pictures of the first.
        angles: Angles that were measured, in degrees.
        protocol: How the numbers were measured, from `describe_protocol`.
        fids: FID and interpolated FID, as far as they were measured.
    """
    totals, image_shape = whole.totals, whole.image_shape
    names = [g.name for g in model.group]
    blocks = model.representation.blocks

    def mean(name: str) -> float:
        return float(totals.mean(name))

    count = totals.count("latent")
    squared = totals.mean("latent squared")
    # Variance over images at each cell: the mean latent carries no information. One image has none.
    variance = (squared - totals.mean("latent").square()) * count / max(count - 1, 1)
    variance = variance if count > 1 else squared

    def encoder_error(g: str, channels: slice) -> float:
        spread = max(float(variance[channels].mean()), 1e-12)
        return float(totals.mean(f"encoder {g}")[channels].mean()) / spread

    psnr_by_element = {g: mean(f"psnr {g}") for g in names}
    gaps = {g: psnr_by_element["identity"] - value for g, value in psnr_by_element.items()}
    symmetric = {
        kind: max(
            abs(mean(f"symmetric {kind} identity") - mean(f"symmetric {kind} {g}")) for g in names
        )
        for kind in symmetric_images(torch.zeros(1, *image_shape))
    }
    deterministic = mean("floor difference") == 0
    flows = has_flow(model)
    steps = STEP_COUNTS if flows else ()
    velocity_error = [
        max(mean(f"velocity {i} {g}") for g in names) / max(mean(f"velocity {i}"), 1e-12)
        for i in range(TIME_BINS if flows else 0)
    ]
    lpips = {g: mean(f"lpips {g}") for g in names if totals.count(f"lpips {g}")}
    matrices = {g.name: model.representation.matrix(g) for g in model.group}
    return Evaluation(
        images=count,
        image_shape=image_shape,
        latent_shape=tuple(squared.shape),
        representation=repr(model.representation),
        multiplicities=dict(model.representation.multiplicities),
        psnr=psnr_by_element["identity"],
        ssim=mean("ssim identity"),
        linear_psnr=mean("linear psnr") if whole.closed_form_split else None,
        linear_ssim=mean("linear ssim") if whole.closed_form_split else None,
        closed_form_split={
            "multiplicities": dict(whole.closed_form_split),
            "linear_psnr": mean("linear psnr of the best split"),
        }
        if whole.closed_form_split
        else None,
        psnr_by_element=psnr_by_element,
        ssim_by_element={g: mean(f"ssim {g}") for g in names},
        gap_db=gaps,
        worst_gap_db=max(map(abs, gaps.values())),
        symmetric_gap_db=symmetric,
        symmetric_worst_gap_db=max(symmetric.values()),
        half_scale_psnr=mean("half scale psnr") if totals.count("half scale psnr") else None,
        deterministic=deterministic,
        noise_floor_db=None if deterministic else mean("floor"),
        encoder_error={g: encoder_error(g, slice(None)) for g in names},
        encoder_error_by_irrep={
            irrep: {g: encoder_error(g, channels) for g in names}
            for irrep, channels in blocks.items()
        },
        decoder_error_db={g: mean(f"agreement {g}") for g in names},
        group_law_error=max(group_law_error(model.group, matrices)[0], mean("law")),
        energy_by_irrep={
            irrep: float(squared[channels].sum() / squared.sum())
            for irrep, channels in blocks.items()
        },
        diffusability=summarize_diffusability(totals, blocks),
        sampler_steps=protocol["sampler_steps"],
        psnr_by_steps={n: mean(f"steps psnr {n}") for n in steps},
        ssim_by_steps={n: mean(f"steps ssim {n}") for n in steps},
        sharpness_by_steps={
            n: mean(f"steps gradient {n}") / max(mean("gradient"), 1e-12) for n in steps
        },
        loss_by_time=[mean(f"loss {i}") for i in range(TIME_BINS)] if flows else None,
        velocity_error_by_time=velocity_error or None,
        rotations=summarize_rotations(totals, angles, variance),
        lpips=lpips.get("identity"),
        lpips_by_element=lpips or None,
        fid=fids[0],
        interpolated_fid=fids[1],
        protocol=protocol,
        seconds=whole.seconds,
        pictures=whole.pictures,
    )


def _name_precision(model: Tokenizer) -> str:
    precision = (model.precision if isinstance(model, Autoencoder) else None) or "fp32"
    named = "fp32, no TF32" if precision == "fp32" else f"{precision}; measures in fp32"
    return f"{named}; compiled" if getattr(model, "compiled", False) else named


def _explain_linear_map(part: Part) -> str:
    if part.closed_form_split:
        return (
            "equivariant linear map of least squared error from patches to a latent of equal size,"
            " fitted to these very images: an upper bound for linear maps"
        )
    side = part.image_shape[1] // part.totals.mean("latent squared").shape[1]
    if (values := part.image_shape[0] * side**2) > LARGEST_PATCH:
        return (
            f"not measured: a patch of {side} x {side} pixels has {values} values, and linear maps"
            f" are fitted to at most {LARGEST_PATCH}"
        )
    return "not measured: the images have too few patches to fit a linear map"


def describe_protocol(
    model: Tokenizer,
    part: Part,
    angles: Sequence[float],
    seed: int,
    lpips: "Lpips | None",
    fid: "Fid | None",
) -> dict[str, Any]:
    totals = part.totals
    flow = model.config.flow if isinstance(model, Autoencoder) and model.has_flow else None
    chosen = (
        "group_law_error, noise_floor_db, symmetric_gap_db, half_scale_psnr, rotations, *_by_steps,"
        " velocity_error_by_time"
    )
    return {
        "images": totals.count("latent"),
        "chosen_images": totals.count("law"),
        "on_chosen_images": f"{chosen}: every k-th image, at most {CHOSEN} in all",
        "data_range": 2.0,
        "clamping": "decodes to [-1, 1], for all but the decoder's agreement and the noise floor",
        "mean": f"per image, then over images; PSNR of an image is at most {LARGEST_PSNR} dB",
        "psnr": "torchmetrics peak_signal_noise_ratio over channels, height and width",
        "ssim": "torchmetrics structural_similarity_index_measure, Gaussian window 11, sigma 1.5,"
        " k1 0.01, k2 0.03, reflected borders",
        "linear_psnr": _explain_linear_map(part),
        "elements": "g^-1 decode(act(g, encode(x)), g noise) against x",
        "diffusability": "latents less the mean of each channel, over the standard deviation of the"
        " rest; one class; Gaussian with a Kronecker covariance; high frequencies from 1/4 of the"
        " largest u + v",
        "rotations": None
        if not angles
        else "decode(act(R, encode(x)), noise) against R x inside the"
        " inscribed disk, from the same noise at all angles; resampling: band-limited, bicubic",
        "sampler": None if flow is None else flow.sampler,
        "sampler_steps": None if flow is None else flow.default_steps,
        "sampler_power": None if flow is None else flow.sampler_power,
        "sampler_shift": None if flow is None else flow.sampler_shift,
        "guidance_scale": None if flow is None else flow.guidance_scale,
        "seed": seed,
        "noise": "image i's from (seed, i)",
        "precision": _name_precision(model),
        "tile": model.tile if isinstance(model, Autoencoder) else None,
        "symmetrize": getattr(model, "symmetrize", None),
        "passes": f"{len(model.group)} per encode and decode, averaged over {model.group.name}"
        if getattr(model, "symmetrize", False)
        else "1 per encode and decode",
        "lpips": None if lpips is None else lpips.protocol,
        "fid": None if fid is None else fid.protocol,
        "versions": {name: version(name) for name in ("torch", "torchmetrics")},
    }
