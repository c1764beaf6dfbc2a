"""Engines in files: whole, cut, altered, forged, and what a file may not name."""

import copy
import itertools
import json
import random
import stat
import struct

import pytest
import torch
from torch import nn

from rarefy import act, engine, kernels
from rarefy.engine import measure
from rarefy.engine.assembling import build
from rarefy.engine.binding import available
from rarefy.engine.building_int8 import Int8Building
from rarefy.engine.capture import capture
from rarefy.engine.file import format, reading, writing
from rarefy.engine.passes import optimize
from tests.engine.networks import UNet, Vision, thinned
from tests.engine.test_capture import f

HEAD = struct.Struct("<8sIIQQ32s")
HANN = torch.hann_window(16)


def make(model, shape, choose="native", precision="float32"):
    x = torch.randn(2, *shape)
    return build(optimize(capture(model.eval(), (x,))), (x,), None, precision, choose, 0.0), x


class Summed(Vision):
    """A network with an operator that PyTorch alone has, of a value and a constant."""

    def forward(self, x):
        return super().forward(x).cumsum(1) + torch.arange(5).bitwise_xor(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An engine with native programs, operators, constants and tensors of its own, its input, and its file."""
    torch.manual_seed(0)
    compiled, x = make(thinned(Summed()), (3, 16, 16))
    path = tmp_path_factory.mktemp("engine") / "vision.engine"
    engine.save(compiled, path)
    return compiled, x, path


def forged(data: bytes, change) -> bytes:
    """The file with its header changed, and a checksum that is right again."""
    *_, length, _ = HEAD.unpack(data[: HEAD.size])
    header = json.loads(data[HEAD.size : HEAD.size + length])
    change(header)
    return sealed(data, header)


def sealed(data: bytes, header, blobs: bytes | None = None) -> bytes:
    magic, version, zero, _, length, _ = HEAD.unpack(data[: HEAD.size])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    blobs = data[HEAD.size + length :] if blobs is None else blobs
    size = HEAD.size + len(text) + len(blobs)
    return HEAD.pack(magic, version, zero, size, len(text), checksum(text, blobs)) + text + blobs


def checksum(text: bytes, blobs: bytes) -> bytes:
    """The right one; any for a header that says nothing of where programs lie, which is refused before."""
    try:
        return format.checksum(text, blobs, json.loads(text))
    except Exception:
        return bytes(32)


def refused(path, data, message="is cut off, altered or not an engine"):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        engine.load(path)
    assert str(path) in str(caught.value)


def test_what_comes_back_is_what_was_saved(saved):
    compiled, x, path = saved
    again = engine.load(path)
    for batch in (1, 2):
        assert torch.equal(compiled(x[:batch]), again(x[:batch]))
    assert again.report == compiled.report
    assert (again.inputs, again.outputs, again.batch, again.threads) == (
        *(compiled.inputs, compiled.outputs),
        *(compiled.batch, compiled.threads),
    )
    # What lies between the steps has no name, and no row where one call was as short as its steps.
    names = [row.name for row in compiled.profile(rounds=1).rows if row.name]
    assert [row.name for row in again.profile(rounds=1).rows if row.name] == names
    with pytest.raises(ValueError, match="the model takes 3 channels"):
        again(torch.zeros(1, 4, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["native", "torch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_kind_of_step_comes_back(tmp_path, choose, precision):
    model = thinned(UNet())
    act.swap(model)
    compiled, x = make(model, (3, 16, 16), choose, precision)
    engine.save(compiled, tmp_path / "unet.engine")
    again = engine.load(tmp_path / "unet.engine")
    assert torch.equal(compiled(x), again(x))
    engine.save(again, tmp_path / "unet.engine")  # in the place of what is mapped
    assert torch.equal(engine.load(tmp_path / "unet.engine")(x), compiled(x))
    assert torch.equal(again(x), compiled(x))


@pytest.mark.slow
def test_what_measuring_chose_comes_back(tmp_path, monkeypatch):
    for way in ("PyTorch, oneDNN", "native and PyTorch"):
        plan_of = optimize(capture(thinned(UNet()), (torch.randn(2, 3, 16, 16),)))
        race = lambda ways, *rest, way=way: {name: float(name != way) for name in ways}  # noqa: E731
        monkeypatch.setattr("rarefy.engine.measure.race", race)
        monkeypatch.setattr("rarefy.engine.measure.slower_than_torch", lambda *a, p=plan_of: {p.steps[0].output})
        x = torch.randn(2, 3, 16, 16)
        compiled = build(plan_of, (x,), 1, "float32", "measure", 0.01)
        engine.save(compiled, tmp_path / "a.engine")
        assert torch.equal(engine.load(tmp_path / "a.engine")(x), compiled(x))


def test_the_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    compiled, x, _ = saved
    path = tmp_path / "folder" / "a.engine"
    engine.save(compiled, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.save(compiled, path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.engine"]
    path.chmod(stat.S_IRUSR)
    assert torch.equal(engine.load(path)(x), compiled(x))


def test_truncations_are_refused(saved, tmp_path):
    *_, path = saved
    data = path.read_bytes()
    *_, length, _ = HEAD.unpack(data[: HEAD.size])
    ends = {0, 1, 8, HEAD.size - 1, HEAD.size, HEAD.size + 1, HEAD.size + length, len(data) // 2, len(data) - 1}
    for end in sorted(ends):
        refused(tmp_path / "cut.engine", data[:end])
    refused(tmp_path / "long.engine", data + b"\0")


def test_altered_bytes_are_refused(saved, tmp_path):
    *_, path = saved
    data = path.read_bytes()
    picked = random.Random(0)
    places = [*range(12), *(picked.randrange(12, len(data)) for _ in range(40)), len(data) - 1]
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << picked.randrange(8)
        refused(tmp_path / "altered.engine", bytes(altered), "engine")


def test_other_files_are_refused(tmp_path):
    refused(tmp_path / "a.engine", b"x" * 1000, "is not an engine")
    torch.save({"a": torch.zeros(3)}, tmp_path / "b.engine")
    refused(tmp_path / "b.engine", (tmp_path / "b.engine").read_bytes(), "is not an engine")
    with pytest.raises(FileNotFoundError):
        engine.load(tmp_path / "c.engine")


def test_another_version_says_so(saved, tmp_path):
    data = bytearray(saved[2].read_bytes())
    data[8] = 9
    refused(
        tmp_path / "new.engine",
        bytes(data),
        f"has version 9 of the format, this rarefy reads {format.VERSION}: compile it again",
    )


def test_without_a_native_engine_native_programs_are_refused(saved):
    *_, path = saved
    with kernels.forced("pytorch"), pytest.raises(ValueError, match="holds native programs, and there is no native"):
        engine.load(path)


def programs(header):
    return [item for item in header["items"] if "program" in item]


def operators(header):
    return [item for item in header["items"] if item.get("step") == "Operator"]


@pytest.mark.parametrize(
    "target",
    [
        *(
            "aten.from_file.default",
            "aten.add_.Tensor",
            "prims.add.default",
            "os.system",
            "python.eval",
            "aten.nothing.x",
        ),
        *("aten", "..", "aten.relu", "rarefy.nothing.default"),
    ],
)
def test_operators_that_a_file_may_not_name(saved, tmp_path, target):
    def change(header):
        operators(header)[0]["fields"]["target"] = target

    refused(tmp_path / "forged.engine", forged(saved[2].read_bytes(), change))


def softmax(header, axis):
    """Let an operator of PyTorch that does not look at its axis before it runs make the output."""
    (port,) = header["outputs"]
    assert len(port["shape"]) <= 3
    args = {"tuple": [{"ref": port["name"]}, axis]}
    about = {"name": "a", "output": "a", "target": "aten.softmax.int", "args": args, "kwargs": {"mapping": {}}}
    header["items"].append({"step": "Operator", "fields": about})
    port["name"] = "a"


def changes():
    """Headers that are wrong in one place, though the checksum is right."""

    def put(*path):
        *where, key, value = path

        def change(header):
            for each in where:
                header = header[each]
            header[key] = value

        return change

    yield put("items", [])
    yield put("items", [{}])
    yield put("items", [{"step": "Engine", "fields": {}}])
    yield put("items", [{"step": "Conv", "fields": {"name": "a"}}])
    for place in ([0, 1 << 60], [-64, 64], [64, 64], [0, 0], [0], None):
        yield lambda header, place=place: programs(header)[0].update(program=place)
    for ports in ([], [{"value": "nobody", "shape": [48]}], [{"value": "x", "shape": [1]}]):
        yield lambda header, ports=ports: programs(header)[0].update(inputs=ports)
        yield lambda header, ports=ports: programs(header)[0].update(outputs=ports)
    yield lambda header: header["items"].append(header["items"][0])
    yield lambda header: header["inputs"].append(header["inputs"][0])
    for axis in (3, -4, 1 << 31):
        yield lambda header, axis=axis: softmax(header, axis)
    yield put("outputs", [])
    yield put("outputs", 0, "name", "nobody")
    yield put("inputs", 0, "dtype", "object")
    yield put("layers", {"a": {}})
    call = {"args": ["tensor"], "kwargs": [], "parameters": []}
    for more in ({"args": []}, {"args": ["number"]}, {"args": [{"tuple": ["tensor", "tensor"]}]}, {"parameters": [1]}):
        yield put("takes", call | more)
    yield put("takes", call | {"args": [], "kwargs": [["x", "tensor"], ["x", {"constant": 1}]]})
    deep: object = "tensor"
    for _ in range(70):
        deep = {"list": [deep]}
    twice = {"dict": [["a", "tensor"], ["a", {"constant": 1}]]}
    for wrong in (
        "object",
        "number",
        1,
        {},
        {"tuple": ["tensor", "tensor"]},
        {"tuple": []},
        {"constant": [1]},
        twice,
        deep,
    ):
        yield put("gives", wrong)
    for kind, key, name in (
        *(("set", "a", "a"), ("dict", None, "a"), ("object", "a", 3), ("result", "0", "builtins:exec")),
        *(("result", "0", "torch.return_types:max"), ("named", 1, "a")),
    ):
        yield put("gives", {kind: [[key, "tensor"]], "name": name})
    yield put("report", {})
    yield lambda header: header.clear()
    needed = ("inputs", "outputs", "takes", "gives", "batch", "items", "constants", "names", "layers", "report")
    for name in (*needed, "reasons"):
        yield lambda header, name=name: header.pop(name)
    for value in ({"tensor": {"shape": [-1], "dtype": "float32", "place": [0, 4], "last": False}}, {"a": 1, "b": 2}):
        yield lambda header, value=value: operators(header)[0]["fields"].update(args=value)
    for place in ([0, 4], [1, 4], [1 << 40, 4], [0, 1 << 40], [0], "ab", None):
        tensor = {"tensor": {"shape": [7], "dtype": "float32", "place": place, "last": False}}
        yield lambda header, tensor=tensor: operators(header)[0]["fields"].update(args=tensor)


@pytest.mark.parametrize("change", list(changes()))
def test_forged_headers_are_refused(saved, tmp_path, change):
    refused(tmp_path / "forged.engine", forged(saved[2].read_bytes(), change))


def test_an_axis_that_is_there_is_not_refused(saved, tmp_path):
    compiled, x, path = saved
    (tmp_path / "a.engine").write_bytes(forged(path.read_bytes(), lambda header: softmax(header, -1)))
    torch.testing.assert_close(engine.load(tmp_path / "a.engine")(x), compiled(x).softmax(-1))


def test_altered_programs_with_a_right_checksum_do_not_crash(saved, tmp_path):
    """The native engine looks at a program itself: it refuses it, or computes something."""
    compiled, x, path = saved
    data = path.read_bytes()
    *_, length, _ = HEAD.unpack(data[: HEAD.size])
    header = json.loads(data[HEAD.size : HEAD.size + length])
    blobs = data[HEAD.size + length :]
    offset, size = programs(header)[0]["program"]
    picked, answers = random.Random(0), []
    for n in range(60):
        altered = bytearray(blobs)
        place = offset + (picked.randrange(min(size, 256)) if n % 2 else picked.randrange(size))
        altered[place] ^= 1 << picked.randrange(8)
        (tmp_path / "a.engine").write_bytes(sealed(data, header, bytes(altered)))
        try:
            answers.append(engine.load(tmp_path / "a.engine")(x).shape)
        except ValueError as error:
            assert "is cut off, altered or not an engine" in str(error)  # noqa: PT017
    assert set(answers) <= {compiled(x).shape}


def test_random_headers_do_not_crash(saved, tmp_path):
    data = saved[2].read_bytes()
    *_, length, _ = HEAD.unpack(data[: HEAD.size])
    picked = random.Random(1)
    for _ in range(60):
        text = bytearray(data[HEAD.size : HEAD.size + length])
        for _ in range(3):
            text[picked.randrange(length)] = picked.randrange(32, 127)
        blobs = data[HEAD.size + length :]
        head = HEAD.pack(*HEAD.unpack(data[: HEAD.size])[:5], checksum(bytes(text), blobs))
        (tmp_path / "a.engine").write_bytes(head + text + blobs)
        try:
            engine.load(tmp_path / "a.engine")
        except ValueError as error:
            assert "is cut off, altered or not an engine" in str(error)  # noqa: PT017


@torch.library.custom_op("rarefy_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_fake(torch.empty_like)


class Foreign(nn.Module):
    def forward(self, x):
        return double(x)


def test_an_operator_of_somebody_else_runs_but_is_not_saved(tmp_path):
    compiled, x = make(Foreign(), (3,))
    assert torch.equal(compiled(x), 2 * x)
    with pytest.raises(ValueError, match=r"the engine runs rarefy_tests.double.default, which cannot be saved"):
        engine.save(compiled, tmp_path / "a.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("forward", "target"),
    [
        (lambda x: x / x.abs().max().item(), "aten.item.default"),
        (
            lambda x: torch.istft(torch.stft(x, 16, 8, window=HANN, return_complex=True), 16, 8, window=HANN),
            "aten.istft",
        ),
    ],
    ids=["item", "istft"],
)
def test_what_reads_numbers_runs_but_is_not_saved(forward, target, tmp_path):
    x = torch.randn(2, 64)
    compiled = engine.compile(f(forward).eval(), x, choose="native")
    torch.testing.assert_close(compiled(x), forward(x))
    with pytest.raises(
        ValueError, match=rf"the engine runs {target}.*, which must read numbers .*: it cannot be saved"
    ):
        engine.save(compiled, tmp_path / "a.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8, track_running_stats=False), nn.InstanceNorm1d(8)])
def test_normalisation_by_the_batch_comes_back(layer, tmp_path):
    path, x = tmp_path / "a.engine", torch.randn(6, 8, 5)
    engine.save(engine.compile(layer.eval(), x[:4], choose="native"), path)
    of = (0, 2) if isinstance(layer, nn.BatchNorm1d) else 2
    expected = (x - x.mean(of, keepdim=True)) / (x.var(of, keepdim=True, correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(engine.load(path)(x), expected, rtol=1e-4, atol=1e-5)


def test_only_engines_are_saved(tmp_path):
    with pytest.raises(TypeError, match="save takes an engine, got Linear"):
        engine.save(nn.Linear(1, 1), tmp_path / "a.engine")


def test_arguments_of_every_kind_come_back():
    given = [1, 2.5, float("inf"), True, None, "a", torch.float16, torch.channels_last, torch.strided, (1, [2])]
    writer = writing._Writer()
    text = json.loads(json.dumps(writer.value(given)))
    reader = reading._Reader(torch.zeros(0, dtype=torch.uint8).numpy(), ())
    assert reader._value(text) == given
    with pytest.raises(ValueError, match="an argument of type complex cannot be saved"):
        writer.value(1j)


def test_native_programs_are_there_to_be_tested():
    assert available()


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    paths = {}
    for choose in ("torch", "native"):
        paths[choose] = tmp_path_factory.mktemp("int8") / f"{choose}.engine"
        made = engine.compile(thinned(UNet()), x[:2], precision="int8", calibration=[x], choose=choose)
        engine.save(made, paths[choose])
    return paths


def item_of(header, kind):
    steps = [step for item in header["items"] for step in (item["int8"]["steps"] if "int8" in item else [item])]
    return next(step for step in steps if step["step"] == kind)


def no_meaning(header):
    item_of(header, "Conv")["quantized"] = [None, None]


def wrong_zero_point(header):
    item_of(header, "Quantize")["quantized"][1][1] = 256


def wrong_scale(header):
    item_of(header, "Quantize")["quantized"][1][0] = 0.1


def plain(header):
    del item_of(header, "Table")["quantized"]


def other_table(header):
    item_of(header, "Table")["fields"]["table"] = item_of(header, "Conv")["fields"]["bias"]


def other_weights(header):
    fields = item_of(header, "Conv")["fields"]
    fields["weight"] = fields["bias"]


def fewer_bits(header):
    mask = item_of(header, "Conv")["fields"]["weight"]["tensor"]["mask"]
    mask[1] -= 1


def other_bits(header):
    weight = item_of(header, "Conv")["fields"]["weight"]["tensor"]
    weight["mask"] = [weight["place"][0], weight["mask"][1]]


def other_scales(header):
    fields = item_of(header, "Conv")["fields"]
    fields["weight_scale"]["shape"] = [3, 4]


def more_operands(header):
    item_of(header, "Pool")["quantized"] *= 2


def a_report_of_none(header):
    header["report"]["quantization"]["layers"][0]["sqnr_db"] = "loud"


@pytest.mark.parametrize("choose", ["torch", "native"])
def test_zeros_of_int8_weights_take_a_bit(tmp_path, choose):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(300, 200)).eval(), torch.randn(8, 300)
    with torch.no_grad():
        model[0].weight[torch.rand(200, 300) < 0.9] = 0.0
    made = engine.compile(model, x, precision="int8", calibration=[x], choose=choose, error_budget=1.0)
    engine.save(made, tmp_path / "a.engine")
    assert (tmp_path / "a.engine").stat().st_size < 300 * 200 * (1 / 8 + 0.1) + 8192
    assert torch.equal(engine.load(tmp_path / "a.engine")(x), made(x))


@pytest.mark.parametrize(
    "change",
    [
        *(no_meaning, wrong_zero_point, wrong_scale, plain, other_table, other_weights, other_scales, more_operands),
        *(fewer_bits, other_bits, a_report_of_none),
    ],
)
@pytest.mark.parametrize("choose", ["torch", "native"])
def test_forged_bytes(in_int8, tmp_path, change, choose):
    assert engine.load(in_int8[choose]).report.precision == "int8"
    refused(tmp_path / "a.engine", forged(in_int8[choose].read_bytes(), change))


def int8_of(header):
    return next(item["int8"] for item in header["items"] if "int8" in item)


def no_shape(header):
    int8_of(header)["shapes"] = {}


def other_shape(header):
    values = int8_of(header)["values"]
    for known in values.values():
        known[0] = [7, *known[0][1:]]


def a_huge_shape(header):
    value = item_of(header, "Quantize")["fields"]["output"]
    int8_of(header)["values"][value][0] = [3, 1 << 30, 1 << 30]


def no_samples(header):
    int8_of(header)["samples"] = 0


def no_outputs(header):
    int8_of(header)["outputs"] = []


def two_meanings(header):
    item_of(header, "Quantize")["quantized"][1][1] ^= 1


def no_first_step(header):
    del int8_of(header)["steps"][0]


def a_step_twice(header):
    int8_of(header)["steps"] *= 2


def no_layout(header):
    int8_of(header)["layouts"] = {"conv": "rows"}


def a_list_of_layouts(header):
    int8_of(header)["layouts"] = ["quads"]


@pytest.mark.parametrize(
    "change",
    [
        *(no_shape, other_shape, a_huge_shape, no_samples, no_outputs, two_meanings, no_first_step),
        *(a_step_twice, no_layout, a_list_of_layouts),
    ],
)
def test_forged_int8_programs(in_int8, tmp_path, change):
    refused(tmp_path / "a.engine", forged(in_int8["native"].read_bytes(), change))


def test_an_int8_engine_runs_without_the_native_library(in_int8):
    x = torch.randn(2, 3, 16, 16)
    made = engine.load(in_int8["native"])
    with kernels.forced("pytorch"):
        plain = engine.load(in_int8["native"])
    assert {step.kernel for step in plain.steps()} == {"PyTorch"}
    assert torch.equal(plain(x), made(x))


def test_layers_take_their_weights_as_before(monkeypatch, tmp_path):
    """What was measured while compiling is in the file: loading measures nothing."""
    kinds = itertools.cycle(("quads", "blocks"))
    monkeypatch.setattr(
        Int8Building, "_fastest", lambda building, batch: dict(zip(building.layers, kinds, strict=False))
    )
    monkeypatch.setattr(measure, "race", lambda ways, *_: {name: float(name != "native") for name in ways})
    x = torch.randn(2, 3, 16, 16)
    made = engine.compile(thinned(UNet()), x, precision="int8", calibration=[x])
    monkeypatch.setattr(Int8Building, "_fastest", None)
    engine.save(made, tmp_path / "a.engine")
    for again in (engine.load(tmp_path / "a.engine"), copy.deepcopy(made)):
        assert [step.kernel for step in again.steps()] == [step.kernel for step in made.steps()]
        assert {"int8 quads", "int8 blocks"} <= {step.kernel for step in again.steps()}
        assert torch.equal(again(x), made(x))
