"""The group D4 of flips and quarter turns, and how it acts on images.

Every element is r^k h^j, reflection first: h = left-right mirror (``x.flip(-1)``), r = one
counter-clockwise quarter turn (``torch.rot90(x, 1, (-2, -1))``). It is a left action, so
``(a @ b).act_on_image(x) == a.act_on_image(b.act_on_image(x))``. All eight, acting on a letter F:

    identity  rot90     rot180    rot270    flip_h    transpose  flip_v    anti_transpose
    ####      #...      ...#      ####      ####      ####       #...      ...#
    #...      #.#.      .###      .#.#      ...#      #.#.       ###.      .#.#
    ###.      #.#.      ...#      .#.#      .###      #.#.       #...      .#.#
    #...      ####      ####      ...#      ...#      #...       ####      ####
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

NAMES = {
    (0, 0): "identity",
    (1, 0): "rot90",
    (2, 0): "rot180",
    (3, 0): "rot270",
    (0, 1): "flip_h",
    (2, 1): "flip_v",
    (1, 1): "transpose",
    (3, 1): "anti_transpose",
}


@dataclass(frozen=True)
class Element:
    """The element r^quarter_turns h^mirrored, the reflection first.

    Attributes:
        quarter_turns: Number of counter-clockwise quarter turns, 0 to 3.
        mirrored: 1 if the element reflects, else 0.
    """

    quarter_turns: int
    mirrored: int

    def __post_init__(self):
        assert (self.quarter_turns, self.mirrored) in NAMES

    @property
    def name(self) -> str:
        """Name in the figure above, such as "rot90"."""
        return NAMES[self.quarter_turns, self.mirrored]

    @property
    def inverse(self) -> "Element":
        """The inverse: r^-k for a rotation r^k; a reflection is its own inverse."""
        return self if self.mirrored else Element(-self.quarter_turns % 4, 0)

    @property
    def swaps_sides(self) -> bool:
        """Whether the element exchanges height and width."""
        return self.quarter_turns % 2 == 1

    def __matmul__(self, other: "Element") -> "Element":
        """Return the product: `other` acts first, then `self` (h r h = r^-1)."""
        sign = -1 if self.mirrored else 1
        return Element(
            (self.quarter_turns + sign * other.quarter_turns) % 4, self.mirrored ^ other.mirrored
        )

    def act_on_image(
        self, image: Shaped[Tensor, "*axes height width"]
    ) -> Shaped[Tensor, "*axes rows columns"]:
        """Apply g to the last two axes; returns a new, contiguous tensor.

        Values may have any dtype and range: they only move. If `swaps_sides`, height and width are
        exchanged.
        """
        flipped = image.flip(-1) if self.mirrored else image
        return torch.rot90(flipped, self.quarter_turns, (-2, -1)).clone(
            memory_format=torch.contiguous_format
        )

    def __repr__(self) -> str:
        return self.name


class Group:
    """A group of flips and quarter turns, in a fixed order with the identity first.

    Attributes:
        name: Key in `GROUPS`.
        elements: Elements, in the order of every tensor axis that runs over the group.
    """

    def __init__(self, name: str, elements: Sequence[Element]):
        self.name = name
        self.elements = tuple(elements)
        assert self.elements[0].name == "identity"
        assert all(a @ b in self.elements for a in self.elements for b in self.elements)

    @property
    def identity(self) -> Element:
        """The identity, always the first element."""
        return self.elements[0]

    def __len__(self) -> int:
        return len(self.elements)

    def __iter__(self) -> Iterator[Element]:
        return iter(self.elements)

    def __getitem__(self, key: int | str) -> Element:
        """Return the element at a position or with a name.

        Raises:
            IndexError: The group has no such position.
            KeyError: The group has no such name; the message lists the names.
        """
        if isinstance(key, int):
            return self.elements[key]
        for element in self.elements:
            if element.name == key:
                return element
        raise KeyError(f"{self.name} has no element {key!r}; it has {', '.join(map(repr, self))}")

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Name a member of `GROUPS`, which copies and pickles then are, or how to build a group.

        Groups are compared, and keys of caches, by identity.
        """
        if GROUPS.get(self.name) is self:
            return self.name.upper()  # of the global variable below
        return Group, (self.name, self.elements)

    def index(self, element: Element) -> int:
        """Return the position of an element in the group's order.

        Raises:
            ValueError: The element is not in the group.
        """
        if element not in self.elements:
            raise ValueError(f"{element} is not in {self}, which has {', '.join(map(repr, self))}")
        return self.elements.index(element)

    @property
    def swaps_sides(self) -> bool:
        """Whether some element exchanges height and width."""
        return any(element.swaps_sides for element in self.elements)

    @property
    def turns(self) -> bool:
        """Whether some element is a half or quarter turn."""
        return any(element.quarter_turns and not element.mirrored for element in self)

    def indices(
        self, elements: Sequence[Element] | Int[Tensor, "count"], count: int
    ) -> Int[Tensor, "count"]:
        """Return the position in this group of each example's element.

        Args:
            elements: One element per example, as elements or as positions in [0, len(group)), which
                are not checked, since that would wait for the device.
            count: Number of examples.

        Raises:
            ValueError: An element is not in the group, or there are not `count` of them.
        """
        if isinstance(elements, Tensor):
            chosen = elements.long()
        else:
            chosen = torch.tensor([self.index(element) for element in elements], dtype=torch.long)
        if chosen.shape != (count,):
            raise ValueError(f"{tuple(chosen.shape)} group elements for {count} examples")
        return chosen

    def sides_after(
        self, elements: Sequence[Element] | Int[Tensor, "count"], height: int, width: int
    ) -> tuple[int, int]:
        """Return height and width of a batch of grids after each example's element acted on it.

        Args:
            elements: One element per example, as for `indices`.
            height: Height of every grid.
            width: Width of every grid.

        Raises:
            ValueError: The grids are not square, and some elements exchange the sides while others
                keep them, or the elements are positions, which are not read.
        """
        if height == width or not self.swaps_sides:
            return height, width
        positions = isinstance(elements, Tensor)
        if positions:
            raise ValueError(
                f"positions in {self}, as a tensor, cannot act on grids of {height} x {width}:"
                " reading which of them exchange the sides would wait for the device; pass one"
                f" element, or a list of elements such as {self}[1] that all exchange the sides or"
                " all keep them"
            )
        by_swapping = {element.swaps_sides: element for element in elements}
        if len(by_swapping) == 2:
            raise ValueError(
                f"{by_swapping[False]} and {by_swapping[True]} cannot act in one batch of grids of"
                f" {height} x {width}: the second makes them {width} x {height}; act on two"
                " batches"
            )
        return (width, height) if True in by_swapping else (height, width)


D4 = Group("D4", [Element(k, j) for j in (0, 1) for k in range(4)])
C4 = Group("C4", [g for g in D4 if not g.mirrored])
FLIPS = Group("flips", [g for g in D4 if not g.swaps_sides])
MIRROR = Group("mirror", [D4["identity"], D4["flip_h"]])
TRIVIAL = Group("trivial", [D4["identity"]])
GROUPS: dict[str, Group] = {group.name: group for group in (D4, C4, FLIPS, MIRROR, TRIVIAL)}


def grid_sources(
    group: Group, height: int, width: int, device: torch.device | str = "cpu"
) -> Int[Tensor, "element cell"]:
    """Return how the group permutes the cells of one grid; do not modify.

    ``g.act_on_image(x).flatten(-2) == x.flatten(-2)[..., sources[i]]`` for g = group[i]. Cached.

    Raises:
        ValueError: The group has quarter turns and the grid is not square.
    """
    if height != width and group.swaps_sides:
        raise ValueError(
            f"a grid of {height} x {width} is not square, but {group.name} has quarter turns:"
            " use square images"
        )
    return _sources(group, height, width, device)


def _sources(group: Group, height: int, width: int, device: torch.device | str) -> Tensor:
    """Return the flat index, on a height x width grid, of the cell that moves to each cell."""
    # A compiler traces what is cached, and warns of the cache.
    find = _find_sources if torch.compiler.is_compiling() else _find_sources_once
    return find(group, height, width, device)


def _find_sources(group: Group, height: int, width: int, device: torch.device | str) -> Tensor:
    cells = torch.arange(height * width, device="cpu").view(height, width)
    return torch.stack([element.act_on_image(cells).flatten() for element in group]).to(device)


# For training, too, wherever they are found first.
_find_sources_once = functools.cache(torch.inference_mode(False)(_find_sources))


def act_on_grid(
    group: Group,
    elements: Element | Sequence[Element] | Int[Tensor, "batch"],
    grid: Shaped[Tensor, "batch channel height width"],
) -> Shaped[Tensor, "batch channel rows columns"]:
    """Move the cells of every example by its element, without host sync.

    Channels keep their values; `Representation.act` also acts on them.

    Args:
        group: Group of the elements.
        elements: One element for all examples; or one per example, as elements or as positions in
            the group. On grids that are not square, all exchange the sides or all keep them.
        grid: Images or feature maps, of any dtype and range.

    Raises:
        ValueError: An element is not in the group; there is not one per example; or the grid is
            not square, the group has quarter turns, and the elements are positions or would give
            grids of two shapes.
    """
    if isinstance(elements, Element):
        return group[group.index(elements)].act_on_image(grid)
    height, width = grid.shape[-2:]
    sides = group.sides_after(elements, height, width)
    chosen = group.indices(elements, len(grid)).to(grid.device)
    sources = _sources(group, height, width, grid.device)[chosen]
    flat = grid.flatten(2)  # (batch, channel, height * width)
    return flat.gather(2, sources[:, None].expand(flat.shape)).view(*grid.shape[:2], *sides)
