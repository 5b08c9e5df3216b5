"""Reads health without pause until its standard input ends; prints what was answered and how long it took.

A process of its own, and blocking: what it measures is the server, not another event loop.

    python tests/health_watcher.py 127.0.0.1 8700 /v1/plugins /readyz
"""

from __future__ import annotations

import http.client
import itertools
import json
import select
import sys
import time
from collections import Counter


def main(host: str, port: str, *paths: str) -> None:
    """Read each path in turn over one connection."""
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    answers: Counter[tuple[str, int]] = Counter()
    took_ms: list[float] = []
    for path in itertools.cycle(paths):
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        began_s = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        took_ms.append((time.perf_counter() - began_s) * 1000)
        json.loads(body)
        answers[path, answer.status] += 1
    took_ms.sort()
    print(
        json.dumps(
            {
                "answers": [[path, status, count] for (path, status), count in answers.items()],
                "p50_ms": took_ms[len(took_ms) // 2],
                "p99_ms": took_ms[int(len(took_ms) * 0.99)],
                "max_ms": took_ms[-1],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
