"""Latents in shards: one ``latent.npy`` per sample, and their format in the index.

Any reader of WebDataset and npy can read them. npy has no bfloat16, which is stored as uint16 with
the same bits; the index names the dtype.
"""

import functools
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from efae.symmetry import Representation

EXTENSION = "latent.npy"
FORMAT = "latents"
"""Key of the index's provenance that holds the format."""
Dtype = Literal["float16", "bfloat16", "float32"]
_STORED = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
_BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}
Buffer = bytes | memoryview
LARGEST_DIFFERENCE = 0.01
"""Between act(g, encode(x)) and encode(g x), for latents of unit scale: what bfloat16 loses."""


class LatentFormat(BaseModel):
    """Format of the latents of a set, and the model that encoded them.

    Attributes:
        shape: Shape (dim, h, w) of every latent.
        dtype: Dtype of their numbers.
        group: Name of the group that acts on them.
        multiplicities: Multiplicities of the representation, by irrep.
        model_digest: SHA-256 of the model's weights; ``models:/NAME@sha256:DIGEST`` pulls them. For
            ``diffusers:PATH``, of weights and configuration.
        model_uri: URI from which the model was pulled.
        certificate: Measured error of the encoder's equivariance; see `ShardDataset`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    shape: list[int]
    dtype: Dtype
    group: str
    multiplicities: dict[str, int]
    model_digest: str
    model_uri: str
    certificate: dict[str, Any]

    @property
    def representation(self) -> "Representation":
        """Representation of the group on the channels."""
        from efae.symmetry import GROUPS, Representation  # torch takes seconds to import

        return Representation(GROUPS[self.group], **self.multiplicities)

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned integer dtype of the numbers' size."""
        return np.dtype(_BITS[self.dtype])

    def require_action(self, where: str, option: str = "augment='group'") -> None:
        """Raise a ValueError if the group does not act on these latents.

        Args:
            where: URI of the set, for the message.
            option: Option that needs the action, for the message.
        """
        if self.group == "trivial":
            raise ValueError(
                f"{option}: the model of {where} has the trivial group, so nothing acts on"
                " its latents: encode with a model of --representation.group D4"
            )
        _, height, width = self.shape
        if height != width and self.representation.group.swaps_sides:
            raise ValueError(
                f"{option}: quarter turns of group {self.group} would make the {height} x"
                f" {width} latents of {where} {width} x {height}, and a batch has one shape: leave"
                " it off and act on whole batches (efae.Representation.act)"
            )
        found = float(self.certificate["max_abs_difference"])
        if not found <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{option}: act(g, encode(x)) and encode(g x) differ by up to {found:.2g} in"
                f" {where}, more than {LARGEST_DIFFERENCE:g}: these latents would not be those of"
                " flipped and turned images; encode with --symmetrize, or with a model of"
                " --model.level exact"
            )

    @property
    def header(self) -> bytes:
        """Header that every npy file of the set starts with."""
        return _make_header(self.dtype, tuple(self.shape))


def find_format(provenance: Mapping[str, Any], where: str) -> LatentFormat | None:
    """Read the format of a latent set from its index's provenance; None for a set of images.

    Raises:
        ValueError: The format is invalid; `where` names the set.
    """
    if FORMAT not in provenance:
        return None
    try:
        found = LatentFormat.model_validate(provenance[FORMAT])
        dim = found.representation.dim
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: its index has no valid format of the latents ({error}): encode it again"
        ) from error
    if len(found.shape) != 3 or min(found.shape) < 1 or found.shape[0] != dim:
        raise ValueError(
            f"{where}: latents of shape {found.shape}, but {found.representation} has {dim}"
            " channels: encode it again"
        )
    return found


def read_bits(data: Buffer, form: LatentFormat) -> np.ndarray:
    """Return a view (dim, h, w) of the bits of one npy file.

    Raises:
        ValueError: The file has another shape or dtype, or is cut off.
    """
    header = form.header
    size = len(header) + int(np.prod(form.shape)) * form.bits.itemsize
    if len(data) != size or bytes(data[: len(header)]) != header:
        raise ValueError(f"not a {form.dtype} latent of shape {tuple(form.shape)}")
    return np.frombuffer(data, form.bits, offset=len(header)).reshape(form.shape)


@functools.cache
def _make_header(dtype: Dtype, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    stored = np.dtype(_STORED[dtype]).newbyteorder("<")
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": np.lib.format.dtype_to_descr(stored),
            "fortran_order": False,
            "shape": shape,
        },
    )
    return file.getvalue()
