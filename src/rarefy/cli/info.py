"""``rarefy info``: what this installation can use of this machine."""

from __future__ import annotations

import argparse
import json

from rarefy.cli import options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    info = commands.add_parser("info", help="versions, processor, and which native kernels load")
    options.add_json(info)
    info.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> int:
    from rarefy import environment, kernels

    about = environment.describe()
    library = kernels.library_path()
    about["native_library"] = None if library is None else str(library)
    about["kernels"] = [{"name": k.name, "isa": k.isa, "supported": k.supported} for k in kernels.table()]
    if arguments.json:
        print(json.dumps(about))
        return 0
    about["cpu_features"] = " ".join(about["cpu_features"])
    for key in ("rarefy", "torch", "python", "platform", "cpu", "cpu_features", "threads", "gpu"):
        print(f"{key.replace('_', ' '):>12}  {about[key] or 'none'}")
    if not kernels.table():
        why = "built without a C++ compiler" if library is None else f"{library} does not load"
        print(f"{'kernels':>12}  none: {why}, everything runs in PyTorch")
        return 0
    print(f"{'kernels':>12}  {library}")
    in_use = environment.native_kernels() or {"none in use": "RAREFY_ISA asks for no kernel that runs here"}
    for name, isa in in_use.items():
        print(f"{'':>12}  {name}: {isa}")
    return 0
