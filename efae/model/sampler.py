"""Sampling from noise to image: time grids, solvers and guidance for dx/dt = velocity(x, t).

In the convention of flow.py, t = 1 is noise and t = 0 the image, so t falls. Here t is a Python
number: the grid lives on the host, and neither solver nor guidance ever waits for a device. A field
passes a network one t per example:

    lambda x, t: model.velocity(x, x.new_full((len(x),), t), latent)
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Field = Callable[[Tensor, float], Tensor]
"""Function of (x (b, ...), t in (0, 1]) that returns dx/dt, in the shape of x."""
Method = Literal["euler", "midpoint", "heun"]

EVALUATIONS: Mapping[Method, int] = {"euler": 1, "midpoint": 2, "heun": 2}
"""Velocity evaluations per step; compare methods at equal steps * EVALUATIONS. Heun's last step to
t = 0 takes only one."""


def time_grid(steps: int, *, power: float = 1.0, shift: float = 1.0) -> Float[Tensor, "points"]:
    """Return steps + 1 times from exactly 1 to exactly 0, strictly falling; float64, on the host.

    Equal steps u = 1, ..., 0 are mapped to u^power, and the result u to
    shift * u / (1 + (shift - 1) * u) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).

    Args:
        steps: Number of steps, at least one.
        power: Exponent; above 1 puts more points near the image (FlowMo, arXiv:2503.11056, uses 4),
            below 1 near the noise.
        shift: Shift; above 1 puts more points near the noise (SD3 uses 3), below 1 near the image.

    Raises:
        ValueError: A value is out of range, or so extreme that two times coincide.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one")
    for name, value in (("power", power), ("shift", shift)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be positive and finite; 1 for equal steps")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
    # This form of the denominator gives exactly 1 and exactly 0 at the ends.
    times = shift * u / (shift * u + (1 - u))
    if not bool((times.diff() < 0).all()):
        raise ValueError(
            f"power={power}, shift={shift}: two of {steps} steps would fall on one time;"
            " use fewer steps, or values nearer 1"
        )
    return times


def integrate(
    velocity: Field,
    noise: Float[Tensor, "b *shape"],
    times: Float[Tensor, "points"] | Sequence[float],
    method: Method = "euler",
    visit: Callable[[float, Tensor], None] | None = None,
) -> Float[Tensor, "b *shape"]:
    """Solve dx/dt = velocity(x, t) from x = noise at times[0]; returns x at times[-1].

    Euler is of first order in the step, midpoint and Heun of second. No method evaluates at t = 0,
    where an image prediction has no velocity: Heun's last step is Euler's, as in algorithm 1 of
    Karras et al. 2022 (arXiv:2206.00364). On grids of power below 1, where that step is long,
    Heun's order falls to 2 * power. Gradients flow unless the caller disables them.

    Args:
        velocity: Field; it is called with t in (0, 1].
        noise: State at times[0].
        times: Times from `time_grid`, or any strictly falling ones in [0, 1]; on the host.
        method: Solver, "euler", "midpoint" or "heun"; EVALUATIONS is the cost of a step.
        visit: Function that receives (t, x) at each of `times`, from the noise to the result.

    Raises:
        ValueError: There is no such method, or the times do not fall within [0, 1].
    """
    if method not in _STEPS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(_STEPS)}")
    step = _STEPS[method]
    grid = [float(t) for t in times]
    spans = list(itertools.pairwise(grid))
    if not (spans and grid[0] <= 1 and grid[-1] >= 0 and all(t > end for t, end in spans)):
        raise ValueError(f"times={grid}: must be two or more, falling, in [0, 1]; see time_grid")
    x = noise
    if visit is not None:
        visit(grid[0], x)
    for t, end in spans:
        x = step(velocity, x, t, end)
        if visit is not None:
            visit(end, x)
    return x


def guide(
    velocity: Field,
    unconditional: Field,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Field:
    """Guide a field classifier-free (Ho & Salimans 2022, arXiv:2207.12598) while low < t <= high.

    There the field is unconditional + scale * (velocity - unconditional). Outside the interval
    (Kynkäänniemi et al. 2024, arXiv:2404.07724), and everywhere at scale 1, it is `velocity` alone
    and takes one evaluation instead of two.

    Args:
        velocity: Field given the latent.
        unconditional: Field given the null condition.
        scale: Guidance scale; 0 is unconditional, 1 no guidance, above 1 guidance.
        interval: Interval (low, high) of t, within [0, 1].

    Raises:
        ValueError: A value is out of range.
    """
    low, high = interval
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale={scale}: must be finite and at least 0; 1 is no guidance")
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval={interval}: must be 0 <= low < high <= 1")
    if scale == 1:
        return velocity

    def guided(x: Tensor, t: float) -> Tensor:
        if not low < t <= high:
            return velocity(x, t)
        base = unconditional(x, t)
        return base + scale * (velocity(x, t) - base)

    return guided


def _step_euler(velocity: Field, x: Tensor, t: float, end: float) -> Tensor:
    return x + (end - t) * velocity(x, t)


def _step_midpoint(velocity: Field, x: Tensor, t: float, end: float) -> Tensor:
    middle = (t + end) / 2
    return x + (end - t) * velocity(_step_euler(velocity, x, t, middle), middle)


def _step_heun(velocity: Field, x: Tensor, t: float, end: float) -> Tensor:
    slope = velocity(x, t)
    ahead = x + (end - t) * slope
    if end == 0:
        return ahead
    return x + (end - t) / 2 * (slope + velocity(ahead, end))


_STEPS: Mapping[Method, Callable[[Field, Tensor, float, float], Tensor]] = {
    "euler": _step_euler,
    "midpoint": _step_midpoint,
    "heun": _step_heun,
}
