"""The two ceilings of the machine: a large copy (GB/s, read and written) and a matrix product."""

from functools import partial

import torch

from bench.harness.session import Session
from bench.harness.timing import interleaved

NAME = "ceilings"
# Bytes of the copy and side of the matrices: large against any cache.
SIZES = {
    "gpu": (4 << 30, 8192),
    "cpu": (512 << 20, 2048),
    "cpu-whole": (512 << 20, 2048),
    "tiny": (1 << 16, 32),
}


def run(session: Session) -> None:
    size, side = SIZES[session.sizes]
    device = session.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Random numbers: zeros need less power, and run faster than any real data.
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    calls = {"copy": partial(target.copy_, source), "matmul": partial(torch.mm, a, b)}
    times = interleaved(calls, device, session.until)
    amounts = {"copy": (2 * size, "GB/s", 1e9), "matmul": (2 * side**3, "TFLOP/s", 1e12)}
    for name, (amount, unit, scale) in amounts.items():
        session.records.add(
            f"{NAME}/{name}",
            {"bytes": 2 * size} if name == "copy" else {"side": side, "dtype": str(dtype)[6:]},
            **times[name].summary("ms", 1e3),
            rate=amount / times[name].quantiles()[1] / scale,
            rate_unit=unit,
        )
