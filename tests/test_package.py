"""The package as it is built and installed: with a compiler, without one, and without the optional extras."""

import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
#: What CMakeLists.txt builds for each kind of processor.
ISAS = {
    "x86_64": {"amx_bf16", "avx512_vbmi2", "avx512", "avx_vnni", "avx2", "portable"},
    "aarch64": {"neon_i8mm", "neon_dotprod", "neon", "portable"},
}


def run(*command, **environment):
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(kind, folder, source=ROOT, **environment):
    """Build an sdist or a wheel of a folder or of an sdist; gives the file."""
    if source == ROOT:
        arguments = ["build", "--no-isolation", "--skip-dependency-check", f"--{kind}", "--outdir", folder, source]
    else:
        arguments = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    run(sys.executable, "-m", *arguments, **environment)
    (made,) = folder.iterdir()
    return made


@pytest.fixture
def installed(tmp_path):
    """Install a wheel alone into an empty environment; gives what runs its programs, without a compiler on PATH."""
    environment = tmp_path / "environment"

    def install(wheel):
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        python = environment / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
        # PyTorch comes from here: it takes a minute to install.
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "pytorch.pth").write_text(str(Path(torch.__file__).parents[1]))

        def call(program, *arguments):
            path = {"PATH": str(environment / "bin"), "CC": "", "CXX": "", "PYTHONPATH": ""}
            return run(environment / "bin" / program, *arguments, **path)

        where = call("python", "-c", "import rarefy; print(rarefy.__file__)").stdout.strip()
        assert where == str(packages / "rarefy" / "__init__.py")
        return call

    return install


TRAINING = """
import torch, rarefy
from rarefy import act, engine
model, x = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Tanh()), torch.randn(8, 20)
sparsifier = rarefy.AutoSparse(model, total_steps=3, target=0.9)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sparsifier.attach(optimizer)
for _ in range(3):
    model(x).square().sum().backward()
    optimizer.step()
sparsifier.finalize()
model.eval()
with torch.no_grad():
    torch.testing.assert_close(engine.compile(model, x)(x), model(x))
    torch.testing.assert_close(act.tanh(x), x.tanh())
print(int((model[0].weight != 0).sum()))
"""


@pytest.mark.slow
def test_the_sdist_is_whole_and_installs_without_a_compiler(tmp_path, installed):
    sdist = build("sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "-C", ROOT, "ls-files", "src", "native", "CMakeLists.txt", "LICENSE", "README.md").stdout
    assert set(tracked.split()) <= names

    nothing = str(tmp_path / "no-compiler")
    wheel = build("wheel", tmp_path / "wheel", sdist, CC=nothing, CXX=nothing)
    assert wheel.name.endswith("-py3-none-any.whl")
    call = installed(wheel)
    done = call("python", "-W", "always", "-c", TRAINING)
    assert done.stdout == "40\n"
    assert done.stderr.count("so everything runs in PyTorch") == 1
    assert "built without a C++ compiler, everything runs in PyTorch" in call("rarefy", "info").stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_the_wheel_runs_on_other_machines_with_every_instruction_set(tmp_path, installed):
    plain = build("wheel", tmp_path / "plain")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(sys.executable, "-m", "auditwheel", "repair", "-w", tmp_path / "dist", plain, PATH=tools)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-py3-none-manylinux_2_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = run("git", "-C", ROOT, "ls-files", "src").stdout.split()
    assert {name.removeprefix("src/") for name in tracked} <= names
    assert {"rarefy/kernels/librarefy.so", "rarefy/kernels/librarefy.so.sha256"} <= names

    call = installed(wheel)
    assert call("python", "-W", "error", "-c", TRAINING).stdout == "40\n"
    isas = call("python", "-c", "from rarefy import kernels; print(*{k.isa for k in kernels.table()})").stdout
    assert set(isas.split()) == ISAS[platform.machine()]
    assert "librarefy.so" in call("rarefy", "info").stdout


IMPORTS = """
import importlib, sys
import rarefy, rarefy.cli
assert "torch" not in sys.modules
assert set(rarefy.__all__) <= set(dir(rarefy)), dir(rarefy)
import torch
before = set(sys.modules)
print(rarefy.AutoSparse, rarefy.cost.count, rarefy.kernels.table, rarefy.models.create)
extras = {"accelerate", "matplotlib", "jinja2", "rich", "yaml", "tensorboard", "safetensors"}
made = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not extras & made, extras & made
slow = {"torch._dynamo", "sympy", "rarefy.act", "rarefy.engine", "rarefy.rtl"}
assert not slow & set(sys.modules), slow & set(sys.modules)
print(rarefy.act.tanh, rarefy.engine.compile, rarefy.rtl.emit, rarefy.sparse.create)
for room, missing in (("train", "accelerate"), ("report", "jinja2")):
    sys.modules[missing] = None
    try:
        importlib.import_module(f"rarefy.{room}")
    except ImportError as error:
        print(error)
"""


def test_what_importing_rarefy_imports_and_what_a_missing_extra_says():
    """What is not used is not imported, no room, no extra and PyTorch neither, and all is there by its name."""
    out = run(sys.executable, "-c", IMPORTS).stdout
    for room, missing in (("train", "accelerate"), ("report", "jinja2")):
        assert f"rarefy.{room} needs {missing}: pip install 'rarefy[train]'" in out
