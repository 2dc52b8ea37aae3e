"""The group, and how it acts on images and latents."""

from efae.symmetry.group import C4, D4, FLIPS, GROUPS, MIRROR, TRIVIAL, Element, Group
from efae.symmetry.representation import Representation, check_representation

__all__ = [
    "C4",
    "D4",
    "FLIPS",
    "GROUPS",
    "MIRROR",
    "TRIVIAL",
    "Element",
    "Group",
    "Representation",
    "check_representation",
]
