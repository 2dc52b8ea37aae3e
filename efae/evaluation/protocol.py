"""What a tokenizer must offer to be measured beside ours; nobody has to inherit from it."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from efae.symmetry import Element, Group, Representation


class Tokenizer(Protocol):
    """Encodes images, acts on latents, decodes them; in evaluation mode."""

    @property
    def group(self) -> Group:
        """What acts on images and latents."""
        ...

    @property
    def representation(self) -> Representation:
        """How it acts on the channels of a latent, in the basis of its irreps."""
        ...

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Image in [-1, 1] to its latent."""
        ...

    def act(
        self, element: Element, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """The action of one element on channels and grid."""
        ...

    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """An image near [-1, 1]; a deterministic decoder ignores steps, noise and seed."""
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
        """dx_t / dt, in the convention of efae/model/flow.py."""
        ...
