"""The representation on the latents of the model that a configuration describes."""

from efae.config import Config
from efae.symmetry import GROUPS, Representation
from efae.symmetry.any_angle import check_turns_by_any_angle


def build_representation(config: Config) -> Representation:
    """Build the representation that a configuration describes.

    Raises:
        ValueError: No such representation exists, or it has fewer invariant channels than the
            image has colours.
    """
    asked, colours = config.representation, config.data.channels
    group = GROUPS[asked.group]
    if asked.multiplicities is not None:
        representation = Representation(
            group, **dict(zip(("a1", "a2", "b1", "b2", "e"), asked.multiplicities, strict=True))
        )
        if representation.dim != asked.dim:
            raise ValueError(
                f"representation.multiplicities={asked.multiplicities} has"
                f" {representation.dim} channels, but representation.dim={asked.dim}"
            )
    else:
        representation = Representation.from_split(
            group=group,
            dim=asked.dim,
            rotation_dims=asked.rotation_dims,
            chirality_split=asked.chirality_split,
            invariant=colours,
        )
    invariant = representation.multiplicities["a1"]
    if invariant < colours:
        raise ValueError(
            f"{representation} has {invariant} invariant channels (A1) for {colours} colours: a"
            " flat patch is symmetric, so only A1 can carry its colour; raise representation.dim"
            f" ({asked.dim}), or lower representation.rotation_dims ({asked.rotation_dims}) or"
            f" representation.chirality_split ({asked.chirality_split})"
        )
    return representation


def check_model(config: Config) -> Representation:
    """Check that a model can be built, without allocating weights, and return its representation.

    Raises:
        ValueError: The model cannot be built.
    """
    representation = build_representation(config)
    height, width = config.data.image_size
    # The other levels act by different elements within one batch.
    free = config.model.kind != "transformer" and config.model.level in ("exact", "none")
    if height != width and representation.group.swaps_sides and not free:
        raise ValueError(
            f"data.resolution={height, width}: not square, but representation.group="
            f"{representation.group} has quarter turns; use square images, model.kind=unet at"
            " model.level=exact, or group flips or mirror"
        )
    if config.loss.rotation_probability:
        check_turns_by_any_angle(representation)
    return representation
