"""Where symmetry pays: ways to use it in training a generator, at equal compute."""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from benchmarks.downstream import generators
from benchmarks.downstream.generators import draw_images, train_generator
from benchmarks.downstream.images import Pose, turn
from benchmarks.downstream.study import Study, show
from benchmarks.downstream.tokenizers import encode_images, select_shards, train_tokenizer
from data_pipelines.loading.dataset import LatentSet
from efae.config import GeneratorConfig
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, Representation
from efae.training.monitoring.flops import count_flops

EQUIVARIANT: dict[str, Any] = {"generator.equivariant": True, "optimizer.learning_rate": 6e-3}
LEVELS = {"exact": "exact", "plain": "none"}


@dataclass(frozen=True)
class Arm:
    """One way to use the symmetry.

    Attributes:
        tokenizer: Tokenizer of the latents.
        views: Share of each batch on which an element acts, which the generator is told.
        copies: Whether the latents of all eight views of an image are stored; the generator is told
            the element, too.
        naive: Whether elements act on the grid alone, as on an image.
        equivariant: Whether the generator commutes with the group.
        dense_blocks: Number of its last blocks that do not.
        poses: Images that the arm is for.
    """

    tokenizer: Literal["exact", "plain"]
    views: float = 0.0
    copies: bool = False
    naive: bool = False
    equivariant: bool = False
    dense_blocks: int = 0
    poses: tuple[Pose, ...] = ("any", "upright")


ARMS: dict[str, Arm] = {
    "exact, equivariant generator": Arm("exact", equivariant=True, poses=("any",)),
    "exact, equivariant generator, last block dense": Arm(
        "exact", equivariant=True, dense_blocks=1, poses=("upright",)
    ),
    "exact, free views": Arm("exact", views=1.0),
    "exact, free views in half of a batch": Arm("exact", views=0.5, poses=("upright",)),
    "exact, as stored": Arm("exact"),
    "plain, as stored": Arm("plain"),
    "plain, eight stored copies": Arm("plain", copies=True),
    "plain, naive flips of the grid": Arm("plain", views=1.0, naive=True, poses=("any",)),
}


def compare(study: Study) -> dict[str, Any]:
    """Run what is missing, the first seed of all before the others; return all results."""
    settings = study.settings
    load = cache(lambda name: _load_tokenizer(study, name))
    sets: list[tuple[Pose, int]] = [("any", size) for size in settings.sizes]
    sets.insert(1, ("upright", settings.upright_size))
    for seeds in ([0], range(1, settings.seeds)):
        for (pose, size), seed in itertools.product(sets, seeds):
            for name, arm in ARMS.items():
                run = {"pose": pose, "size": size, "arm": name, "seed": seed}
                if pose in arm.poses and not study.has(**run):
                    row = run | _run(study, load, arm, pose, size, seed)
                    study.add(row)
                    study.say(f"{run}: {row['steps']} steps, FID {row['fid']:.1f}")
    return study.results


def _load_tokenizer(study: Study, name: str) -> tuple[Any, Autoencoder]:
    """Return a tokenizer's folder and model; both learn from images in any pose."""
    folder = train_tokenizer(study, "any", name, {"model.level": LEVELS[name]})
    return folder, Autoencoder.from_pretrained(folder)


def _run(study: Study, load: Any, arm: Arm, pose: Pose, size: int, seed: int) -> dict[str, Any]:
    folder, tokenizer = load(arm.tokenizer)
    views = arm.tokenizer == "plain"
    whole = encode_images(
        folder,
        study.generator_images(pose, seed, views),
        study.held_out("any").uri,
        study.folder / pose / f"{arm.tokenizer}-latents-{seed}",
    )
    latents = select_shards(whole, size, arm.copies)
    dense = generators.configure(latents, {"training.seed": seed})
    other, kind = dense, "dense"
    if arm.equivariant:
        other = with_overrides(dense, EQUIVARIANT | {"generator.dense_blocks": arm.dense_blocks})
        kind = "last block dense" if arm.dense_blocks else "equivariant"
    steps = study.count_steps(
        {"dense": (dense, latents), kind: (other, latents)}, study.settings.generator_seconds
    )[kind]
    config = with_overrides(other, {"data.views": arm.views} if not arm.naive else {})
    if arm.naive:
        config = claim_views(config, latents, arm.views)
    config = with_overrides(config, {"training.steps": steps})
    generator, spent = train_generator(config, latents)
    images = draw_images(generator, tokenizer, study.settings.samples, seed)
    row: dict[str, Any] = {
        "steps": steps,
        "cpu_seconds": spent,
        "tflops": count_flops(config).own * config.training.global_batch_size * steps / 1e12,
        "parameters": sum(p.numel() for p in generator.parameters()),
        "stored_latents": len(latents),
        "largest_difference": whole.certificate["max_abs_difference"],
        **study.judge(pose).measure(images),
    }
    if pose == "any":  # what anyone can do with samples of images without an upright
        row["fid_turned"] = study.judge(pose).measure_fid(turn(images, seed))
    return row


def claim_views(config: GeneratorConfig, latents: LatentSet, share: float) -> GeneratorConfig:
    """Return a configuration with views by an action that moves cells alone.

    The encoder does not commute with it, so the certificate that generators ask for is made up.
    """
    invariant = Representation(D4, a1=latents.format.shape[0]).multiplicities
    form = latents.format.model_copy(
        update={"multiplicities": invariant, "certificate": {"max_abs_difference": 0.0}}
    )
    claimed = {"data.format": form.model_dump_json(), "data.views": share}
    return with_overrides(config, claimed)


def print_tables(results: dict[str, Any]) -> None:
    """Print, in Markdown, mean and standard deviation over the seeds."""
    for pose in ("any", "upright"):
        runs = [run for run in results["runs"] if run["pose"] == pose]
        sizes = sorted({run["size"] for run in runs})
        columns = " | ".join(f"{size:,} images" for size in sizes)
        print(f"\n{pose}: FID / precision / recall\n\n| arm | {columns} |")
        print("|---|" + "---|" * len(sizes))
        for arm in ARMS:
            cells: list[str] = []
            for size in sizes:
                own = [run for run in runs if run["arm"] == arm and run["size"] == size]
                fid, *others = (
                    show([run[key] for run in own], form) if own else ""
                    for key, form in (("fid", ".1f"), ("precision", ".2f"), ("recall", ".2f"))
                )
                cells.append(" / ".join([fid, *(value.split(" ")[0] for value in others)]))
            if any(cell.strip(" /") for cell in cells):
                print(f"| {arm} | {' | '.join(cells)} |")
