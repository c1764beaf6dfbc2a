"""Requests a second, and how long they take, of the engine and of onnxruntime behind examples/serve.py.

One network (ResNet-50 with 90 % zeros, one picture a request) is served by uvicorn in one and in two worker processes.
The engine runs a request on one thread, several requests at once on several; onnxruntime has the threads that it takes
by itself. CLIENTS connections, in this process, each send the next request when the last one is answered. The servers
are asked in turn, ROUNDS times; they and the clients share the processor. Needs the extras serve and export.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np

import engine_models
from rarefy import engine

ROOT = Path(__file__).parents[1]
NETWORK = "resnet50-90"
FIELDS = ("network", "runtime", "workers", "clients", "requests", "seconds", "per_second", "p50_ms", "p99_ms")


@contextmanager
def served(path: Path, workers: int) -> Iterator[int]:
    """A server of the file, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT / "examples"), "serve:app"]
    command += ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    server = subprocess.Popen(command, env={**os.environ, "NETWORK": str(path), "OMP_NUM_THREADS": "1"})
    try:
        yield port
    finally:
        server.terminate()
        server.wait(60)


def ask(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    connection.request("POST", "/predict", body)
    reply = connection.getresponse()
    said = reply.read()
    if reply.status != 200:
        raise RuntimeError(f"the server answered {reply.status}: {said[:200]!r}")
    return said


def client(port: int, body: bytes, until: float, took: list[float]) -> None:
    """Ask until then, one request after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.perf_counter() < until:
        begun = time.perf_counter()
        ask(connection, body)
        took.append(time.perf_counter() - begun)
    connection.close()


def wait(port: int, body: bytes, clients: int) -> np.ndarray:
    """The server's first answer, as soon as it gives one, and as many more as warm every worker."""
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            found = [ask(connection, body)]
            break
        except OSError:
            time.sleep(0.2)
    else:
        raise RuntimeError("the server did not start")
    warm: list[float] = []
    together(port, body, clients, 1.0, warm)
    answer: np.ndarray = np.load(BytesIO(found[0]))
    return answer


def together(port: int, body: bytes, clients: int, seconds: float, took: list[float]) -> float:
    """Seconds that the clients ran for."""
    begun = time.perf_counter()
    threads = [threading.Thread(target=client, args=(port, body, begun + seconds, took)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of asking in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.csv")
    arguments = parser.parse_args()
    x = engine_models.inputs(1, NETWORK)
    files = {"rarefy": engine_models.FOLDER / f"{NETWORK}.engine", "onnxruntime": engine_models.onnx(NETWORK)}
    if not files["rarefy"].exists():
        engine.save(engine.compile(engine_models.build(NETWORK), x, threads=1), files["rarefy"])
    content = BytesIO()
    np.save(content, x.numpy())
    body, rows, answers = content.getvalue(), list[dict[str, object]](), dict[str, np.ndarray]()
    ways = [(runtime, workers) for workers in (1, 2) for runtime in files]
    took: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    seconds = dict.fromkeys(ways, 0.0)
    with ExitStack() as servers:
        ports = {way: servers.enter_context(served(files[way[0]], way[1])) for way in ways}
        for way in ways:
            answers[way[0]] = wait(ports[way], body, arguments.clients)
        for way in ways * arguments.rounds:
            seconds[way] += together(ports[way], body, arguments.clients, arguments.seconds, took[way])
    for runtime, workers in ways:
        times, whole = took[runtime, workers], seconds[runtime, workers]
        p50, p99 = (1e3 * float(np.percentile(times, q)) for q in (50, 99))
        figures = (len(times), f"{whole:.1f}", f"{len(times) / whole:.2f}", f"{p50:.1f}", f"{p99:.1f}")
        rows.append(dict(zip(FIELDS, (NETWORK, runtime, workers, arguments.clients, *figures), strict=True)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    difference = np.abs(answers["rarefy"] - answers["onnxruntime"]).max() / np.abs(answers["onnxruntime"]).max()
    print(f"largest difference of the answers: {difference:.1e} of the largest")
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
