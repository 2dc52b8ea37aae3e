"""The model card: what a model is, how good it is and how to use it, in Hugging Face's layout.

Markdown below a YAML header. Text from a run is escaped: none of it becomes markup.
"""

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from efae.config import Config
from efae.model.networks.diffusers_vae import read_factors
from efae.model.representation import build_representation
from efae.report.html import finite, plain
from efae.symmetry import GROUPS, Group, Representation
from efae.symmetry.representation import irrep_matrix
from efae.tracking.redaction import redact

_TRAINING = (
    *("preset", "run_name", "steps", "images_seen", "precision", "device", "world_size"),
    *("wall_seconds", "recoveries", "commit", "mlflow_run_id"),
)


def render_model_card(
    numbers: Mapping[str, Any] | None, config: Config, facts: Mapping[str, Any]
) -> str:
    """Render README.md of one model; secrets are redacted.

    Args:
        numbers: Numbers of an evaluation, from `Evaluation.numbers`; None if it was not measured.
        config: Configuration of the model.
        facts: Facts about the run, as in `efae.report.card.Card`; missing ones are left out. Beside
            them "credit" of the training images, "licence" of the weights and, on the Hugging Face
            Hub, "repo_id", "revision", "space" and "programs", the folder of its ONNX programs.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "text": _escape, "quoted": _quote}
    group, representation = GROUPS[config.representation.group], build_representation(config)
    f, (height, width) = config.model.downsampling, config.data.image_size
    image_shape = [config.data.channels, height, width]
    latent_shape = [representation.dim, height // f, width // f]
    if numbers:
        image_shape, latent_shape = numbers["image_shape"], numbers["latent_shape"]
    model_uri = facts.get("model_uri") or f"models:/{config.tracking.registered_model}/VERSION"
    card = environment.get_template("model_card.md.jinja").render(
        title=str(
            facts.get("repo_id") or facts.get("run_name") or config.tracking.registered_model
        ),
        numbers=numbers,
        level=config.model.level,
        foreign=_name_class(config),
        exact=_is_exact(config),
        kept=_name_kept_factors(config, representation),
        group=group.name,
        image_shape=image_shape,
        latent_shape=latent_shape,
        compression=math.prod(image_shape) / math.prod(latent_shape),
        held_out=str(facts.get("held_out_data") or facts.get("data") or "not recorded which"),
        train_data=facts.get("train_data"),
        credits=list_training_credits(facts),
        front=_summarize(numbers) if numbers else [],
        rows=_tabulate(numbers) if numbers else [],
        elements=len(group),
        irreps=_describe_irreps(representation, numbers["energy_by_irrep"] if numbers else {}),
        encoder_error=max(numbers["encoder_error"].values()) if numbers else None,
        example="rot90" if "rot90" in map(str, group) else str(list(group)[-1]),
        model_uri=str(model_uri),
        licence=facts.get("licence", ""),
        repo_id=facts.get("repo_id", ""),
        revision=facts.get("revision", ""),
        space=facts.get("space", ""),
        programs=facts.get("programs", ""),
        downsampling=f,
        power_of_two=f & (f - 1) == 0,
        training={
            name.replace("_", " "): facts[name]
            for name in _TRAINING
            if "steps" in facts and facts.get(name) not in (None, "")
        },
    )
    return redact(card)


def list_training_credits(facts: Mapping[str, Any]) -> list[str]:
    """Return the credits of the training images, each once.

    Args:
        facts: Facts, as `render_model_card` takes them. Without "train_data", "credits" are those
            of other images, on which the model was measured.
    """
    credits: Any = facts.get("credits") if facts.get("train_data") else None
    listed = [credits] if isinstance(credits, str) else credits or []
    return list(dict.fromkeys([*listed, *filter(None, [facts.get("credit")])]))


def _is_exact(config: Config) -> bool:
    """Return whether encoder and decoder are equivariant by construction."""
    free_encoder = config.start.is_diffusers and not config.start.symmetrize
    return config.model.level == "exact" and not free_encoder


def _name_class(config: Config) -> str:
    """Return the class of a fine-tuned autoencoder of diffusers; "" of a flow autoencoder."""
    if config.model.kind != "diffusers":
        return ""
    return str(json.loads(config.start.architecture)["_class_name"])


def _name_kept_factors(config: Config, representation: Representation) -> str:
    """Return whether latents have the factors of a pretrained model: "wholly", "in part" or ""."""
    if not config.keeps_latents:
        return ""
    factors = read_factors(json.loads(config.start.architecture))
    plain = not any(factors.shift) and len(set(factors.scale)) == 1
    invariant = representation.multiplicities["a1"] == representation.dim
    return "wholly" if plain or invariant else "in part"


def _summarize(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    named = {
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "lpips": "LPIPS",
        "fid": "FID of reconstructions",
        "worst_gap_db": "worst equivariance gap, dB",
    }
    return [
        (name, label, _as_yaml(numbers[name]))
        for name, label in named.items()
        if finite(numbers[name]) is not None
    ]


def _tabulate(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    protocol = numbers["protocol"]
    chosen = f"{protocol['chosen_images']} of the images"
    rows = [
        ("PSNR", f"{numbers['psnr']:.2f} dB", protocol["psnr"]),
        ("SSIM", f"{numbers['ssim']:.4f}", protocol["ssim"]),
        *(
            [("PSNR of the best linear map", f"{linear:.2f} dB", protocol["linear_psnr"])]
            if (linear := numbers["linear_psnr"]) is not None
            else []
        ),
        (
            "worst gap",
            f"{plain(abs(numbers['worst_gap_db']))} dB",
            "largest difference in PSNR between an element and the identity",
        ),
        (
            "worst gap, symmetric images",
            f"{plain(abs(numbers['symmetric_worst_gap_db']))} dB",
            f"the same on {chosen}, made exactly symmetric",
        ),
        (
            "group law error",
            plain(numbers["group_law_error"]),
            f"largest entry of rho(a b) - rho(a) rho(b), and of a (b z) - (a b) z on {chosen}",
        ),
        (
            "encoder error",
            plain(max(numbers["encoder_error"].values())),
            "E|encode(g x) - act(g, encode(x))|^2 over the latent's variance, for the worst g",
        ),
    ]
    for name in ("lpips", "fid"):
        if numbers[name] is not None:
            rows.append((name.upper(), plain(numbers[name]), str(protocol[name])))
    return rows


def _describe_irreps(
    representation: Representation, energy_by_irrep: Mapping[str, float | None]
) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for irrep, channels in representation.blocks.items():
        first, last = channels.start, channels.stop - 1
        energy = finite(energy_by_irrep.get(irrep))
        rows.append(
            {
                "channels": f"{first} to {last}" if first < last else str(first),
                "name": irrep.upper(),
                "energy": "unknown" if energy is None else f"{100 * energy:.0f} %",
                "does": _describe_irrep(irrep, representation.group),
            }
        )
    return rows


def _describe_irrep(irrep: str, group: Group) -> str:
    if irrep == "e":
        return "turns and flips planes of two channels like the axes of the image"
    flipped = [g.name for g in group if irrep_matrix(irrep, g).item() < 0]
    return f"changes sign under {', '.join(flipped)}" if flipped else "nothing: invariant"


def _as_yaml(value: float) -> str:
    # YAML 1.1 reads 3e-07 as a string, 3.0e-07 as a number.
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else str(float(f"{value:.6g}"))


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a valid string in YAML and in Python


def _escape(value: Any) -> str:
    one_line = " ".join(str(value).split())
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(one_line, quote=False))
