"""The interface that a tokenizer needs to be evaluated; nothing has to inherit from it."""

from typing import Protocol, TypeGuard, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from efae.symmetry import Element, Group, Representation


class Tokenizer(Protocol):
    """A tokenizer in evaluation mode: it encodes images, acts on latents and decodes them."""

    @property
    def group(self) -> Group:
        """Group that acts on images and latents."""
        ...

    @property
    def representation(self) -> Representation:
        """Representation of the group on the channels of a latent, in the basis of the irreps."""
        ...

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode an image in [-1, 1]."""
        ...

    def act(
        self, element: Element, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """Act on channels and grid of a latent by one element."""
        ...

    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Decode to an image near [-1, 1]; a deterministic decoder ignores all but the latent."""
        ...


@runtime_checkable
class FlowTokenizer(Tokenizer, Protocol):
    """A tokenizer whose decoder follows a velocity field from noise at t = 1 to the image."""

    def velocity(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"],
    ) -> Float[Tensor, "b c h w"]:
        """Return dx_t / dt, in the convention of efae/model/flow.py."""
        ...


def has_flow(model: Tokenizer) -> TypeGuard[FlowTokenizer]:
    """Return whether a tokenizer's decoder follows a velocity field."""
    return isinstance(model, FlowTokenizer) and getattr(model, "has_flow", True)
