"""The package as it is built and installed: with a compiler, without one, and without the optional extras."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(folder, **environment):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, env={**os.environ, **environment}, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def python_with(wheel, folder, code):
    """Run code that sees the wheel's package and not the working tree's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    prelude = f"""
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
        sys.path.insert(0, {str(folder)!r})
        import rarefy
        assert rarefy.__file__.startswith({str(folder)!r}), rarefy.__file__
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_everything_works_in_pytorch(tmp_path):
    nothing = str(tmp_path / "no-compiler")
    wheel = build_wheel(tmp_path / "wheel", CC=nothing, CXX=nothing)
    assert wheel.name.endswith("-py3-none-any.whl")
    out = python_with(
        wheel,
        tmp_path / "site",
        """
        import torch
        from rarefy import cli, kernels
        assert kernels.library_path() is None
        model = torch.nn.Sequential(torch.nn.Linear(20, 20))
        sparsifier = rarefy.AutoSparse(model, total_steps=3, target=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        for _ in range(3):
            model(torch.randn(8, 20)).square().sum().backward()
            optimizer.step()
        print(int((sparsifier.finalize()[0].weight != 0).sum()))
        cli.main(["info"])
        """,
    )
    assert out.splitlines()[0] == "40"
    assert "built without a C++ compiler, everything runs in PyTorch" in out


def test_with_a_compiler_the_library_is_in_the_wheel(tmp_path):
    wheel = build_wheel(tmp_path / "wheel")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    out = python_with(wheel, tmp_path / "site", "print(rarefy.kernels.library_path(), len(rarefy.kernels.table()))")
    path, count = out.split()
    assert Path(path).parent == tmp_path / "site" / "rarefy" / "kernels"
    assert int(count) >= 3
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "rarefy/py.typed" in names
    assert "rarefy/report/templates/report.html" in names


@pytest.mark.parametrize(("room", "missing"), [("train", "accelerate"), ("report", "jinja2")])
def test_a_missing_extra_is_named(room, missing):
    program = f"import sys; sys.modules[{missing!r}] = None\nimport rarefy\nimport rarefy.{room}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"rarefy.{room} needs {missing}: pip install 'rarefy[train]'" in done.stderr


def test_importing_rarefy_imports_none_of_the_extras():
    program = (
        "import sys, torch; before = set(sys.modules); import rarefy; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"accelerate", "matplotlib", "jinja2", "rich", "yaml", "tensorboard", "safetensors"} & set(eval(out))


def test_importing_rarefy_is_quick_and_offers_the_rooms():
    """Neither the compiler of PyTorch nor a room that is not used is imported, and all are there by their names."""
    program = (
        "import sys, rarefy; slow = {'torch._dynamo', 'sympy', 'rarefy.act', 'rarefy.engine', 'rarefy.rtl'}; "
        "assert not slow & set(sys.modules), slow & set(sys.modules); "
        "print(rarefy.act.tanh, rarefy.engine.compile, rarefy.rtl.emit, rarefy.sparse.create)"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
