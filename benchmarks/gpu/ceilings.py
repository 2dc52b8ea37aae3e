"""What the card gives: copies, the model's matrix products, its attention, its nonlinearity."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.rows import Rows
from benchmarks.gpu.timing import median_ms
from efae.model.octic.layers import Nonlinearity
from efae.model.octic.layout import from_regular, to_regular
from efae.symmetry import D4

WIDTH, TOKENS, BATCH = 1024, 1024, 64  # of imagenet_256


def measure(rows: Rows) -> None:
    """Add the rows; TFLOP/s count two per multiply-add, TB/s what must be read and written."""
    device, scale = rows.device, 64 if rows.smoke else 1
    half = {"device": device, "dtype": torch.bfloat16}

    def add(name: str, prepare: Callable[[], tuple[Callable[[], Any], float, str]]) -> None:
        def run() -> dict[str, Any]:
            call, amount, unit = prepare()
            ms = median_ms(call, device, *((2, 1) if rows.smoke else ()))
            return {"ms": round(ms, 4), unit: round(amount / ms / 1e9, 4)}

        rows.add("ceilings", name, run)

    def copy() -> Any:
        source = torch.zeros(2**30 // scale // scale, **half)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 4 * source.numel(), "tb_per_s"

    def product(*shape: int) -> Any:
        *batch, m, k, n = shape
        a, b = torch.randn(*batch, m, k, **half), torch.randn(*batch, k, n, **half)
        return lambda: a @ b, 2 * m * k * n * (batch[0] if batch else 1), "tflops"

    def attend(heads: int, size: int, backward: bool) -> Any:
        batch, tokens = BATCH // min(scale, BATCH), TOKENS // scale
        query, key, value = (
            torch.randn(batch, heads, tokens, size, **half, requires_grad=True) for _ in range(3)
        )

        def call() -> None:
            mixed = F.scaled_dot_product_attention(query, key, value)
            if backward:
                mixed.backward(torch.ones_like(mixed))

        flops = 4 * batch * heads * tokens**2 * size * (3 if backward else 1)
        return call, flops, "tflops"

    def activate(kind: str, backward: bool) -> Any:
        layer = Nonlinearity(D4).to(device)
        x = torch.randn(4, BATCH * TOKENS // scale, WIDTH, **half, requires_grad=backward)
        call: Callable[[Tensor], Tensor] = layer
        if kind == "matrix products":

            def call(x: Tensor) -> Tensor:
                regular = F.relu(to_regular(layer.fourier, x))
                return from_regular(layer.fourier, regular, len(x))

        def both() -> None:
            y = call(x)
            if backward:
                y.backward(torch.ones_like(y))

        return both, x.numel() * 2 * (7 if backward else 2), "tb_per_s"

    side = 8192 // scale
    add("copy", copy)
    add(f"product {side} x {side} x {side}", lambda: product(side, side, side))
    m = BATCH * TOKENS // scale
    for k, n in ((256, 256), (256, 768), (256, 1024), (1024, 256), (512, 2048)):
        add(f"octic product 4 x {k} -> {n}", lambda k=k, n=n: product(4, m, k, n))
    for k, n in ((1024, 1024), (1024, 3072), (4096, 1024)):
        add(f"dense product {k} -> {n}", lambda k=k, n=n: product(m, k, n))
    for heads, size in ((16, 64), (8, 128)):
        for backward in (False, True):
            passes = "forward and backward" if backward else "forward"
            add(
                f"attention of {heads} heads of {size}, {passes}",
                lambda h=heads, s=size, b=backward: attend(h, s, b),
            )
    for kind in ("matrix products", "as dispatched"):
        for backward in (False, True):
            passes = "forward and backward" if backward else "forward"
            add(
                f"octic nonlinearity, {kind}, {passes}",
                lambda k=kind, b=backward: activate(k, b),
            )
