"""The import picture of the house: rooms, arrows, floors, circles, and arrows that run up.

    python scripts/rooms.py                  # the rooms of src/rarefy
    python scripts/rooms.py src/rarefy/act   # the rooms inside one of them

A room is a package or a module of that folder; an arrow goes from a room to one that it imports, anywhere in its code.
Between the rooms of the house an import for types alone counts, too; inside a room, where files may know each other's
types, it does not. The floor of a room is the longest way down from it. ``ORDER`` is what CONTRIBUTING.md says: a
room may use those of the lines before its own and, of its own line, those named before it. Exits with 1 where there is
a circle, an arrow that runs up, or a room that has no place in the order.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

#: From the ground up. A name that begins with an underscore is a module that several rooms share.
ORDER = (
    ("_names", "_checks", "_files", "_json", "_yaml", "_prices", "_transformer"),
    ("kernels", "environment", "_products", "_forward", "cost", "latency"),
    ("sparse", "act", "sparse_files", "onnx_files"),
    ("engine", "rtl"),
    ("models", "data"),
    ("train",),
    ("report", "compare", "integrations", "bench"),
    ("cli",),
)

Arrows = dict[str, set[str]]


def picture(folder: Path, types: bool) -> Arrows:
    """Read what every room of a folder imports of the others there, with or without what is for ``types`` alone."""
    package = ".".join(folder.parts[folder.parts.index("rarefy") :])
    files = [path for path in sorted(folder.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    rooms = {path.stem: path for path in files}
    rooms |= {path.parent.name: path.parent for path in sorted(folder.glob("*/__init__.py"))}
    arrows: Arrows = {}
    for room, path in sorted(rooms.items()):
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        names = {name for file in files for name in _imported(ast.parse(file.read_text(encoding="utf-8")), types)}
        below = {name.removeprefix(f"{package}.").partition(".")[0] for name in names if name.startswith(f"{package}.")}
        arrows[room] = (below & rooms.keys()) - {room}
    return arrows


def _imported(tree: ast.AST, types: bool) -> Iterator[str]:
    """Name what a piece of code imports; of ``from a import b`` that is ``a.b``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{each.name}" for each in node.names)
        yield from _imported(node, types)


def circles(arrows: Arrows) -> list[set[str]]:
    """Find the groups of rooms that reach each other."""
    reach = {room: set(below) for room, below in arrows.items()}
    for middle in arrows:
        for room in arrows:
            if middle in reach[room]:
                reach[room] |= reach[middle]
    groups = {frozenset(other for other in arrows if other in reach[room] and room in reach[other]) for room in arrows}
    return [set(group) for group in sorted(groups, key=sorted) if group]


def floors(arrows: Arrows) -> list[list[str]]:
    """Put every room above all that it imports; the rooms of a circle, and those above it, are left out."""
    placed: list[list[str]] = []
    left = dict(arrows)
    while ready := sorted(room for room, below in left.items() if not below & left.keys()):
        placed.append(ready)
        left = {room: below for room, below in left.items() if room not in ready}
    return placed


def upward(arrows: Arrows) -> list[str]:
    """Name the arrows that run against the order, and the rooms without a place in it."""
    place = {room: number for number, room in enumerate(room for line in ORDER for room in line)}
    lost = [f"{room} has no place in the order" for room in arrows if room not in place]
    placed = [(room, other) for room in arrows for other in sorted(arrows[room]) if {room, other} <= place.keys()]
    return lost + [f"{room} -> {other} runs up" for room, other in placed if place[other] > place[room]]


def main(folder: Path) -> int:
    """Print the picture; gives 1 where something is wrong with it."""
    house = folder.name == "rarefy"
    arrows = picture(folder, types=house)
    for number, line in enumerate(floors(arrows)):
        for room in line:
            print(f"floor {number}  {room:14} {' '.join(sorted(arrows[room]))}")
    around = circles(arrows)
    wrong = [f"a circle: {' '.join(sorted(group))}" for group in around] + (upward(arrows) if house else [])
    print(
        f"{len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows, {len(floors(arrows))} floors,"
        f" {len(around)} circles" + (f", {len(wrong) - len(around)} against the order" if house else "")
    )
    for message in wrong:
        print(message)
    return 1 if wrong else 0


if __name__ == "__main__":
    HOUSE = Path(__file__).resolve().parents[1] / "src" / "rarefy"
    given = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HOUSE
    sys.exit(main(given))
