"""Two processes that train together, as torchrun would start them."""

import os
import socket
import subprocess
import sys


def run_two(module: str, folder: object, timeout: int = 150) -> list[tuple[str, str]]:
    """Run ``python -m MODULE FOLDER`` as ranks 0 and 1, which must end well; gives what each wrote to its streams."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = []
    try:
        for process in started:
            said.append(process.communicate(timeout=timeout))
            assert process.returncode == 0, said[-1][1]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return said
