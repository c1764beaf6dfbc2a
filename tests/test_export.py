"""``rarefy export``: what a run left, for onnxruntime and in few bytes, or one clear message."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rarefy
from rarefy import engine, models, onnx_files
from rarefy.cli import main
from rarefy.data import fashion_mnist
from rarefy.onnx_files import save_onnx
from tests.cli import printed, refused

pytestmark = pytest.mark.slow

SHAPE = (1, 28, 28)


class Branches(nn.Module):
    """A small CNN with a residual and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cat([x, torch.nn.functional.silu(self.conv(x) + x)], 1)
        return self.fc(self.depthwise(x).mean((2, 3)))  # type: ignore[no-any-return]


def trained(model: nn.Module, steps: int = 4) -> nn.Module:
    """With a mask that AutoSparse found."""
    sparsifier = rarefy.AutoSparse(model, target=0.8, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, *SHAPE)).square().mean().backward()
        optimizer.step()
    return sparsifier.finalize()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, float | None]:
    torch.manual_seed(1)
    model = trained(Branches())
    path = tmp_path_factory.mktemp("onnx") / "deep" / "model.onnx"
    return model, path, save_onnx(model, torch.zeros(1, *SHAPE), path)


def test_a_trained_mask_is_zeros_and_nothing_else(exported: tuple[nn.Module, Path, float | None]) -> None:
    model, path, _ = exported
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert kinds <= {"Conv", "Relu", "Add", "Concat", "Sigmoid", "Mul", "ReduceMean", "Gemm", "Squeeze", "Swish"}
    assert sum(node.op_type == "Mul" for node in graph.node) <= 1  # SiLU's
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    assert sum(array.ndim > 1 for array in constants.values()) == 4
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            zeros = parameter == 0
            assert zeros.float().mean() > 0.3
            assert np.array_equal(constants[name] == 0, zeros.numpy()), name
    assert {"conv.weight", "fc.weight"} <= constants.keys()
    assert np.array_equal(constants["fc.weight"], model.get_parameter("fc.weight").detach().numpy())


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_gives_the_same_at_any_batch(batch: int, exported: tuple[nn.Module, Path, float | None]) -> None:
    model, path, difference = exported
    assert difference is not None
    assert 0 <= difference < 1e-5
    x = torch.randn(batch, *SHAPE)
    (answer,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_nothing_else_is_left_behind(exported: tuple[nn.Module, Path, float | None]) -> None:
    assert [path.name for path in exported[1].parent.iterdir()] == ["model.onnx"]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x)


@pytest.mark.parametrize(
    ("model", "message"), [(Noise(), "answers differently from PyTorch, by"), (Unknown(), "cannot export Unknown")]
)
def test_a_file_that_is_not_right_is_not_written(model: nn.Module, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the old one")
    with pytest.raises(RuntimeError, match=message):
        save_onnx(model.train(), torch.zeros(1, 3, 3), path)
    assert model.training
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.onnx", "the old one")]


# What models take and give


class Tokens(nn.Module):
    """Token ids (B, T) to one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embedding(ids).mean(1))  # type: ignore[no-any-return]


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.float() / 255)  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Two inputs; a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        a, b = self.left(left), self.right(right)
        return {"sum": a + b, "parts": (a, [b, (a - b).relu()])}


def answers(path: Path, **inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return [torch.from_numpy(each) for each in found]


def test_token_ids(tmp_path: Path) -> None:
    model, path = Tokens().eval(), tmp_path / "model.onnx"
    difference = save_onnx(model, torch.tensor([[1, 6, 0]]), path)
    assert difference is not None
    assert difference < 1e-5
    ids = torch.randint(0, 7, (5, 3))
    (answer,) = answers(path, input=ids)
    torch.testing.assert_close(answer, model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_pixels_of_a_byte(tmp_path: Path) -> None:
    model, path = Pixels().eval(), tmp_path / "model.onnx"
    save_onnx(model, torch.arange(250, 256, dtype=torch.uint8)[None], path)
    x = torch.randint(0, 256, (5, 6)).to(torch.uint8)
    (answer,) = answers(path, input=x)
    torch.testing.assert_close(answer, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_float16(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half().eval(), tmp_path / "model.onnx"
    save_onnx(model, torch.zeros(2, 4, dtype=torch.float16), path)
    x = torch.randn(5, 4).half()
    (answer,) = answers(path, input=x)
    assert answer.dtype is torch.float16
    torch.testing.assert_close(answer, model(x).detach(), rtol=1e-2, atol=5e-3)


def test_what_onnxruntime_cannot_run_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot run Linear as exported.* did not write the file \(try model.float"):
        save_onnx(nn.Linear(4, 3).bfloat16(), torch.zeros(2, 4, dtype=torch.bfloat16), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Reshape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1)


def test_bfloat16_that_onnxruntime_can_run(tmp_path: Path) -> None:
    assert save_onnx(Reshape(), torch.zeros(2, 4, 3, dtype=torch.bfloat16), tmp_path / "model.onnx") == 0
    model = onnx.load(tmp_path / "model.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


@pytest.mark.slow
def test_two_inputs_and_nested_outputs(tmp_path: Path) -> None:
    model, path = Pair().eval(), tmp_path / "model.onnx"
    left, right = torch.randn(3, 4), torch.randn(3, 5)
    with torch.no_grad():
        a, b = model.left(left), model.right(right)
    expected = [a + b, a, b, (a - b).relu()]
    save_onnx(model, {"left": left, "right": right}, path)
    torch.testing.assert_close(answers(path, left=left, right=right), expected, rtol=1e-4, atol=1e-5)
    save_onnx(model, (left[:1], right[:1]), path)
    assert [each.name for each in onnx.load(path).graph.output] == ["output_0", "output_1", "output_2", "output_3"]
    torch.testing.assert_close(answers(path, input_0=left, input_1=right), expected, rtol=1e-4, atol=1e-5)


class Wrapper(nn.Module):
    """It names none of its arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.model(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # which PyTorch itself calls
@pytest.mark.parametrize("wrap", [Wrapper, torch.compile])
def test_models_without_names_of_arguments(wrap: Any, tmp_path: Path) -> None:
    model, path = Pair().eval(), tmp_path / "model.onnx"
    left, right = torch.randn(3, 4), torch.randn(3, 5)
    expected = tree_leaves(model(left, right))
    save_onnx(wrap(model), (left[:1], right[:1]), path)
    torch.testing.assert_close(answers(path, input_0=left, input_1=right), expected, rtol=1e-4, atol=1e-5)
    save_onnx(wrap(model), {"right": right, "left": left}, path)
    torch.testing.assert_close(answers(path, left=left, right=right), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_model_is_refused_by_its_class(tmp_path: Path) -> None:
    x = torch.randn(1, 4)
    for model in ("resnet20", engine.compile(nn.Linear(4, 3).eval(), x, choose="torch")):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"):
            save_onnx(model, x, tmp_path / "model.onnx")


# The command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a finished run leaves, as far as an export reads it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {
        "name": "test",
        "model": {"name": "resnet20", "width": 4},
        "method": {"name": "autosparse", "target": 0.8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(2)
    model = trained(models.resnet20(num_classes=10, width=4, in_channels=1))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the exporter, which takes seconds."""

    def write(model: nn.Module, example: Tensor, path: Path) -> float:
        path.write_text(f"{sum(p.numel() for p in model.parameters())} {tuple(example.shape)} {model.training}")
        return 1e-7

    monkeypatch.setattr(onnx_files, "save_onnx", write)


@pytest.mark.slow
def test_a_run_to_onnx(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--to", "onnx"]) == 0
    lines = {line[:8].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}
    assert lines["file"] == "run/model.onnx"
    state = load_file(run / "model.safetensors")
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    share = 100 * (1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights))
    assert lines["zeros"] == f"{share:.2f} % of {sum(w.numel() for w in weights):,} weights"
    assert lines["checked"].startswith("onnxruntime differs by ")
    session = onnxruntime.InferenceSession(run / "model.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("input", ["batch", *SHAPE])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("output", ["batch", 10])]


def test_a_run_to_sparse_weights_and_from_there(run: Path, capsys: pytest.CaptureFixture[str], no_work: None) -> None:
    found = printed(capsys, "export", "run", "--to", "safetensors")
    assert found["file"] == "run/model.sparse.safetensors"
    assert found["bytes"] == Path(found["file"]).stat().st_size < 0.5 * found["dense_bytes"]
    state, original = rarefy.load_sparse(found["file"]), load_file(run / "model.safetensors")
    assert state.keys() == original.keys()
    assert all(torch.equal(state[key], original[key]) for key in state)
    options = ["--set", "width=4", "--set", "in_channels=1", "--input", "1,32,32", "--output", "out/a.onnx"]
    Path("out").mkdir()
    found = printed(capsys, "export", found["file"], "--to", "onnx", "--model", "resnet20", *options)
    assert found["difference"] == 1e-7
    count = sum(p.numel() for p in models.resnet20(width=4, in_channels=1).parameters())
    assert Path("out/a.onnx").read_text() == f"{count} (1, 1, 32, 32) False"


@pytest.mark.parametrize("to", ["engine", "onnx"])
def test_a_run_in_int8(to: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: str) -> Any:
        assert folder == "mine"
        return SimpleNamespace(train_images=torch.randint(0, 256, (300, 28, 28), dtype=torch.uint8))

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {"folder": "mine", "train_size": 200}}))
    monkeypatch.setattr(fashion_mnist, "load", load)
    found = printed(capsys, "export", "run", "--to", to, *INT8)
    assert found["quantization"]["samples"] == 200
    assert 0 < found["quantization"]["error"] < 0.1
    np.save("few.npy", np.random.default_rng(0).standard_normal((70, *SHAPE), np.float32))
    assert main(["export", "run", "--to", to, *INT8, "--calibration", "few.npy"]) == 0
    assert "mse of 70 examples; 0 of 22 layers stay float32; error of the outputs" in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_run_to_an_engine(precision: str, tolerance: float, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "export", "run", "--to", "engine", "--precision", precision, "--output", "a.engine")
    assert found["chosen"]
    loaded = engine.load("a.engine")
    assert loaded.report.precision == precision
    model = models.resnet20(num_classes=10, width=4, in_channels=1).eval()
    model.load_state_dict(load_file(run / "model.safetensors"))
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = model(x)
    assert (loaded(x) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.slow
def test_without_onnxruntime_it_is_written_and_said(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert main(["export", "run", "--to", "onnx", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "not checked: onnxruntime is not installed (pip install 'rarefy[export]')\n"
    assert json.loads(out)["difference"] is None
    onnx.checker.check_model(onnx.load("run/model.onnx"))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_exporter(
    missing: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    message = refused(capsys, "export", "run", "--to", "onnx")
    assert f"export to ONNX needs {missing}: pip install 'rarefy[export]'" in message


INT8 = ["--precision", "int8"]
RESNET = ["--model", "resnet20", "--set", "width=4", "--set", "in_channels=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "onnx"], "there is no nowhere; give a run's folder or a safetensors file"),
        ([".", "--to", "onnx"], "is not a run's folder: it has no recipe.yaml"),
        (["unfinished", "--to", "onnx"], "unfinished has no model.safetensors: the run has not finished"),
        (["text", "--to", "safetensors"], "text is cut off, altered or not a safetensors file"),
        (["weights", "--to", "onnx"], "add --model NAME and --input SHAPE"),
        (["weights", "--to", "onnx", *RESNET], "add --model NAME and --input SHAPE"),
        (["weights", "--to", "onnx", "--model", "resnet2", "--input", "1,28,28"], "did you mean 'resnet20'?"),
        (["weights", "--to", "onnx", "--model", "resnet20", "--input", "1,28,28"], "weights does not fit the network"),
        (["weights", "--to", "onnx", *RESNET, "--input", "1,28,x"], "--input must be sizes with commas"),
        (
            ["weights", "--to", "onnx", *RESNET, "--input", f"1,28,{'9' * 5000}"],
            f"for example 3,224,224, got '1,28,{'9' * 74}\n",
        ),
        (["weights", "--to", "onnx", *RESNET, "--input", "1,99999999,99999999"], "of shape (1, 99999999, 99999999): "),
        (["weights", "--to", "onnx", *RESNET, "--input", "3,28,28"], "does not take inputs of shape (3, 28, 28)"),
        (["weights", "--to", "onnx", *RESNET, "--set", "widht=4", "--input", "1,28,28"], "did you mean 'width'?"),
        (["weights", "--to", "onnx", *RESNET, "--set", "width", "--input", "1,28,28"], "--set takes KEY=VALUE"),
        (["weights", "--to", "onnx", *RESNET, "--set", "width=a", "--input", "1,28,28"], "--set takes KEY=VALUE"),
        (
            ["weights", "--to", "onnx", *RESNET, "--set", f"width={'[' * 100_000}", "--input", "1,28,28"],
            f"such as num_classes=10, got 'width={'[' * 73}\n",
        ),
        (["run", "--to", "onnx", "--model", "resnet20"], "run says what its model is: leave --model and --set out"),
        (["run", "--to", "onnx", "--precision", "bfloat16"], "--to onnx writes float32 or int8, not bfloat16"),
        (["run", "--to", "safetensors", "--precision", "int8"], "--to safetensors writes float32, not int8"),
        (["run", "--to", "engine", "--calibration", "a.npy"], "--calibration is for --precision int8, got float32"),
        (["weights", "--to", "onnx", *INT8, *RESNET, "--input", "1,28,28"], "int8 needs --calibration FILE.npy"),
        (["run", "--to", "engine", *INT8, "--calibration", "text"], "takes a file of numpy.save with float32 examples"),
        (
            ["run", "--to", "engine", *INT8, "--calibration", "empty"],
            "takes a file of numpy.save with float32 examples",
        ),
        (["run", "--to", "engine", *INT8, "--calibration", "cut"], "takes a file of numpy.save with float32 examples"),
        (["run", "--to", "engine", *INT8, "--calibration", "(("], "float32 examples, (( is none: "),
        (["run", "--to", "engine", *INT8, "--calibration", "few.npy"], "(2, 3, 28, 28) of float64"),
        (["weights", "--to", "safetensors", "--output", "weights"], "cannot write to weights, which is the weights"),
        (["weights", "--to", "safetensors", "--output", "run"], "cannot write to run, which is a folder"),
    ],
)
def test_what_cannot_be_exported(
    arguments: list[str], message: str, run: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text").write_text("nonsense " * 100)
    Path("empty").write_bytes(b"")
    Path("cut").write_bytes(b"PK\x03\x04abc")
    Path("((").write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16)
    Path("weights").write_bytes((run / "model.safetensors").read_bytes())
    Path("unfinished").mkdir()
    Path("unfinished/recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    np.save("few.npy", np.zeros((2, 3, 28, 28)))
    before = sorted(Path().rglob("*"))
    assert message in refused(capsys, "export", *arguments)
    assert sorted(Path().rglob("*")) == before
