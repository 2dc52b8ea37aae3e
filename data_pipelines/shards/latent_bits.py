"""Latents as bits: rounded and packed for a shard, and acted on without unpacking.

In the basis of the irreps, every rho(g) is a signed permutation, so an element acts on the stored
bits without rounding: it moves numbers and flips their sign bits.
"""

import numpy as np
import torch
from jaxtyping import Float

from data_pipelines.shards.latent_format import LatentFormat
from efae.symmetry import Element


def torch_dtype(form: LatentFormat) -> torch.dtype:
    """Return the dtype of the set's numbers."""
    return getattr(torch, form.dtype)


def pack_latents(latent: Float[torch.Tensor, "b dim h w"], form: LatentFormat) -> list[bytes]:
    """Round latents to the set's dtype; return one npy file for each.

    Raises:
        ValueError: A number is not finite after rounding.
    """
    rounded = latent.to("cpu", torch_dtype(form)).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ValueError(f"a latent has numbers that are not finite as {form.dtype}")
    width = {2: torch.int16, 4: torch.int32}[form.bits.itemsize]
    header = form.header
    return [header + row.tobytes() for row in rounded.view(width).numpy()]


class BitAction:
    """Action of group elements on the bits of one latent: on channels and grid."""

    def __init__(self, form: LatentFormat):
        representation = form.representation
        source, sign = representation.tables(torch.device("cpu"))
        self.group = representation.group
        self._source = source.numpy()
        top = np.array(1 << (8 * form.bits.itemsize - 1), form.bits)
        self._flips = np.where(sign.numpy() < 0, top, 0).astype(form.bits)[..., None, None]

    def __call__(self, element: Element, bits: np.ndarray, out: np.ndarray) -> None:
        """Write act(element, latent) into `out`, (dim, h, w)."""
        number = self.group.index(element)
        # (g z)(p) = rho(g) z(g^-1 p): permute channels, transform the grid, flip signs.
        moved = bits[self._source[number]]
        if element.mirrored:
            moved = moved[..., ::-1]
        moved = np.rot90(moved, element.quarter_turns, (-2, -1))
        np.bitwise_xor(moved, self._flips[number], out=out)
