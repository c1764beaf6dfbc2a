"""A function in processes of their own, as one process group."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing


def _run(rank, function, folder, count, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(function(*arguments), folder / f"{rank}.pt")
    dist.barrier()
    # The group is not destroyed, whose threads may want the lock that is held meanwhile; and the end of the interpreter
    # may abort (pytorch/pytorch#190489).
    os._exit(0)


def apart(function, folder, *arguments, count=1):
    """Return what a function of a module gives in each of ``count`` processes; files go into the folder."""
    torch.multiprocessing.spawn(_run, (function, folder, count, arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
