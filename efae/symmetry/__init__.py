"""The group, and how it acts on images and latents."""

from efae.symmetry.group import D4, TRIVIAL, Element, Group
from efae.symmetry.representation import Representation, check_representation

__all__ = ["D4", "TRIVIAL", "Element", "Group", "Representation", "check_representation"]
