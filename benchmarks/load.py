"""A small HTTP load: keep-alive connections that POST as fast as they are answered.

Our own, because it needs nothing installed and costs little beside the server it measures.
"""

from __future__ import annotations

import asyncio
from statistics import quantiles
from time import perf_counter


async def post_repeatedly(port: int, path: str, connections: int, seconds: float) -> dict[str, float]:
    """Requests per second and latency in milliseconds. Raises RuntimeError at the first answer that is not 200."""
    until = perf_counter() + seconds
    latencies: list[float] = []
    started = perf_counter()
    await asyncio.gather(*(client(port, path, until, latencies) for _ in range(connections)))
    elapsed = perf_counter() - started
    cuts = quantiles(latencies, n=100)
    return {"requests_per_second": len(latencies) / elapsed, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


async def client(port: int, path: str, until: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()
    try:
        while (sent := perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            await reader.readexactly(content_length(head))
            latencies.append(perf_counter() - sent)
    finally:
        writer.close()


def content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
