"""Sparse files: every bit comes back, in about as many bytes as promised, and a damaged file is refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rarefy
from rarefy import models
from rarefy.sparse_files import digest, is_sparse_file

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def thin(*shape: int, density: float = 0.1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, weight, 0.0)


def stored_names(path: Path) -> set[str]:
    return set(load_file(path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (4001 * size,), generator=generator, dtype=torch.uint8)
    bits.view(-1, size)[torch.rand(4001, generator=generator) < 0.95] = 0
    state = {"weight": bits.view(dtype)}
    rarefy.save_sparse(state, tmp_path / "file")
    assert_same(rarefy.load_sparse(tmp_path / "file"), state)
    stored = load_file(tmp_path / "file")
    assert stored["weight.values"].dtype == dtype
    assert stored["weight.bitmask"].shape == (501,)


def test_signed_zeros_nan_payloads_and_subnormals_are_values(tmp_path: Path) -> None:
    bits = torch.zeros(1000, dtype=torch.int32)
    odd = [-(2**31), 0x7FC00001, -0x3FFFFF, 0x7F800000, 1, 0x7F800001]  # -0.0, NaNs, infinity, smallest, signalling
    bits[100 : 100 + len(odd)] = torch.tensor(odd, dtype=torch.int32)
    state = {"weight": bits.view(torch.float32)}
    rarefy.save_sparse(state, tmp_path / "file")
    assert_same(rarefy.load_sparse(tmp_path / "file"), state)
    assert load_file(tmp_path / "file")["weight.values"].view(torch.int32).tolist() == odd


def test_the_layout_as_it_is_documented(tmp_path: Path) -> None:
    weight = torch.zeros(10, 11)
    weight[0, 0], weight[0, 9], weight[9, 10] = 1.0, 2.0, 3.0
    rarefy.save_sparse({"a.weight": weight, "a.bias": torch.ones(3)}, tmp_path / "file")
    stored = load_file(tmp_path / "file")
    assert stored.keys() == {"a.weight.values", "a.weight.bitmask", "a.bias"}
    assert stored["a.weight.values"].tolist() == [1.0, 2.0, 3.0]
    assert stored["a.weight.bitmask"].tolist() == [1, 2, *[0] * 11, 1 << (109 % 8)]
    about = metadata(tmp_path / "file")
    assert (about["format"], about["format_version"]) == ("rarefy-sparse", "1")
    assert json.loads(about["shapes"]) == {"a.weight": [10, 11]}
    assert json.loads(about["tied"]) == {}
    assert about["sha256"] == digest(stored, about)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    transposed=st.booleans(),
)
def test_any_shape(
    shapes: list[list[int]], density: float, dtype: torch.dtype, transposed: bool, tmp_path: Path
) -> None:
    state = {str(i): (thin(*shape, density=density, seed=i) * 9).to(dtype) for i, shape in enumerate(shapes)}
    if transposed:
        state = {name: tensor.permute([*reversed(range(tensor.dim()))]) for name, tensor in state.items()}
    rarefy.save_sparse(state, tmp_path / "file")
    assert_same(rarefy.load_sparse(tmp_path / "file"), state)


@pytest.mark.parametrize(("density", "dtype"), [(0.1, torch.float32), (0.05, torch.bfloat16), (0.2, torch.int8)])
def test_values_and_one_bit_a_weight(density: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = (thin(300, 1000, density=density) * 50).to(dtype)
    nonzeros, size = int((weight != 0).sum()), weight.element_size()
    rarefy.save_sparse({"weight": weight}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= nonzeros * size + 300_000 / 8 + 1000


@pytest.mark.parametrize(("nonzeros", "sparse"), [(0, True), (500, True), (930, True), (940, False), (1000, False)])
def test_the_smaller_of_both_ways_is_taken(nonzeros: int, sparse: bool, tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    weight[:nonzeros] = 1.0
    rarefy.save_sparse({"weight": weight}, tmp_path / "file")
    assert stored_names(tmp_path / "file") == ({"weight.values", "weight.bitmask"} if sparse else {"weight"})


def test_tied_scalar_and_empty_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 50, bias=False), nn.BatchNorm1d(50))
    model[0].weight = nn.Parameter(thin(50, 20))
    model[1].weight = model[0].weight
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("another", torch.zeros(0, 3))
    rarefy.save_sparse(model, tmp_path / "file")
    assert {"0.weight.values", "2.num_batches_tracked", "empty", "another"} <= stored_names(tmp_path / "file")
    assert not any(name.startswith("1.") for name in stored_names(tmp_path / "file"))
    state = rarefy.load_sparse(tmp_path / "file")
    assert_same(state, model.state_dict())
    assert state["1.weight"] is state["0.weight"]


def test_views_that_overlap_are_not_tied(tmp_path: Path) -> None:
    whole = thin(40, 40)
    state = {"whole": whole, "rows": whole[:20], "turned": whole.T, "flat": whole.reshape(-1)}
    rarefy.save_sparse(state, tmp_path / "file")
    assert_same(rarefy.load_sparse(tmp_path / "file"), state)


def test_names_that_look_like_parts(tmp_path: Path) -> None:
    state = {"a": thin(100, 10), "a.values": torch.ones(2), "a.values.bitmask": thin(50, 50), "b": thin(100, 10)}
    rarefy.save_sparse(state, tmp_path / "file")
    assert stored_names(tmp_path / "file") >= {"a", "a.values", "b.values", "b.bitmask"}
    assert_same(rarefy.load_sparse(tmp_path / "file"), state)


def test_a_trained_network_loads_into_a_dense_one(tmp_path: Path) -> None:
    model = models.fashion_cnn()
    sparsifier = rarefy.AutoSparse(model, target=0.9, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 28, 28)).square().mean().backward()
        optimizer.step()
    model = sparsifier.finalize().eval()
    rarefy.save_sparse(model, tmp_path / "file")
    save_file(model.state_dict(), tmp_path / "dense")
    assert (tmp_path / "file").stat().st_size < 0.17 * (tmp_path / "dense").stat().st_size
    other = models.fashion_cnn().eval()
    other.load_state_dict(rarefy.load_sparse(tmp_path / "file"))
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(other(x), model(x))


def test_what_is_loaded_is_not_the_file(tmp_path: Path) -> None:
    rarefy.save_sparse({"weight": thin(40, 40), "bias": torch.ones(40)}, tmp_path / "file")
    for tensor in rarefy.load_sparse(tmp_path / "file").values():
        tensor.fill_(3.0)
    assert_same(rarefy.load_sparse(tmp_path / "file"), {"weight": thin(40, 40), "bias": torch.ones(40)})
    state = rarefy.load_sparse(tmp_path / "file")
    rarefy.save_sparse({"bias": state["bias"]}, tmp_path / "file")  # over the file that it came from
    assert_same(rarefy.load_sparse(tmp_path / "file"), {"bias": torch.ones(40)})


# What cannot be stored


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "'entry' is of type int: leave it out"),
        (torch.eye(3).to_sparse(), "'entry' is torch.sparse_coo, torch.float32"),
        (torch.empty(3, device="meta"), "'entry' is on the meta device"),
        (torch.zeros(3, dtype=torch.complex128), "'entry' is torch.strided, torch.complex128"),
    ],
)
def test_what_is_no_dense_tensor(entry: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rarefy.save_sparse({"weight": torch.ones(3), "entry": entry}, tmp_path / "file")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rarefy.save_sparse({"weight": torch.ones(3)}, tmp_path / "file")

    write = Path.write_bytes

    def fail(partial: Path, data: bytes) -> None:
        write(partial, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        rarefy.save_sparse({"weight": torch.zeros(3)}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert rarefy.load_sparse(tmp_path / "file")["weight"].tolist() == [1, 1, 1]


# Damaged files

STATE = {"weight": thin(30, 40), "bias": torch.arange(5.0), "scale": torch.ones(())}
STATE["weight"][-1, -1] = 1.0  # the last bit: a shorter shape must miss it


def metadata(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    rarefy.save_sparse(STATE, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in {*range(0, len(content), 37), *range(12), len(content) - 1}:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut is cut off, altered or not a safetensors file"):
            rarefy.load_sparse(tmp_path / "cut")
    (tmp_path / "longer").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="longer is cut off, altered"):
        rarefy.load_sparse(tmp_path / "longer")


def test_a_bit_turned_anywhere(tmp_path: Path) -> None:
    """Refused, or, where JSON does not care, the same weights."""
    rarefy.save_sparse(STATE, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    refused = 0
    places = [*range(0, 8 + length, 2), *range(8 + length, len(content), 7)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        (tmp_path / "changed").write_bytes(changed)
        try:
            state = rarefy.load_sparse(tmp_path / "changed")
        except ValueError as error:
            refused += str(tmp_path / "changed") in str(error)
        else:
            assert place < 8 + length
            assert_same(state, STATE)
            refused += 1
    assert refused == len(places)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], *, sign: bool = True) -> None:
    """Write STATE as somebody else might, with a digest that is right."""
    rarefy.save_sparse(STATE, path)
    stored, about = load_file(path), metadata(path)
    change(stored, about)
    if sign:
        about["sha256"] = digest(stored, about)
    save_file(stored, path, metadata=about)


def less(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    stored["weight.values"] = stored["weight.values"][1:].clone()


def more(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    stored["weight.values"] = stored["weight.values"].repeat(2)


def square(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    stored["weight.values"] = stored["weight.values"][None]


def no_mask(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    del stored["weight.bitmask"]


def twice(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    stored["weight"] = torch.ones(30, 40)


def wrong_kind(stored: dict[str, Tensor], about: dict[str, str]) -> None:
    stored["weight.bitmask"] = stored["weight.bitmask"].view(torch.int8)


def shapes(text: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda stored, about: about.update(shapes=text)


def tied(text: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda stored, about: about.update(tied=text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (less, r"the bitmask of weight marks \d+ of 1200 weights, \d+ are there"),
        (more, r"the bitmask of weight marks \d+ of 1200 weights, \d+ are there"),
        (square, r"must have values of one dimension and 150 bytes of bitmask for its 1200 weights, got \(1, \d+\)"),
        (no_mask, "weight must be stored as weight.values and weight.bitmask"),
        (twice, "weight must be stored as"),
        (wrong_kind, "150 bytes of bitmask"),
        (shapes('{"weight": [30, 41]}'), "154 bytes of bitmask for its 1230 weights"),
        (shapes('{"weight": [1193]}'), "the bitmask of weight marks"),  # a weight beyond the last
        (shapes('{"weight": [30, -40]}'), r"the shape of weight is \[30, -40\]"),
        (shapes('{"weight": [true]}'), r"the shape of weight is \[True\]"),
        (shapes('{"weight": 3}'), "the shape of weight is 3"),
        (shapes(f'{{"weight": [0, {2**63}]}}'), r"the shape of weight is \[0, 9"),
        (shapes("[]"), r"'shapes' in its header is \[\]"),
        (shapes("{"), "its header has no 'shapes' in JSON"),
        (shapes("[" * 100_000), "its header has no 'shapes' in JSON"),
        (tied('{"other": "nothing"}'), "other is tied to 'nothing', which is not stored"),
        (tied('{"bias": "scale"}'), "bias is tied to 'scale'"),
        (tied('{"other": []}'), r"other is tied to \[\]"),
    ],
)
def test_parts_that_do_not_fit(
    change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str, tmp_path: Path
) -> None:
    rewritten(tmp_path / "file", change)
    with pytest.raises(ValueError, match=message):
        rarefy.load_sparse(tmp_path / "file")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        rarefy.load_sparse(tmp_path / "file")
    save_file({"weight": torch.ones(3)}, tmp_path / "dense")
    assert not is_sparse_file(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"no sparse one of rarefy; safetensors.torch.load_file reads it"):
        rarefy.load_sparse(tmp_path / "dense")
    rewritten(tmp_path / "later", lambda stored, about: about.update(format_version="2"), sign=False)
    assert is_sparse_file(tmp_path / "later")
    with pytest.raises(ValueError, match="has format_version '2', this rarefy reads '1': update rarefy"):
        rarefy.load_sparse(tmp_path / "later")
    rewritten(tmp_path / "unsigned", lambda stored, about: about.pop("sha256") and None, sign=False)
    with pytest.raises(ValueError, match="its checksum is another"):
        rarefy.load_sparse(tmp_path / "unsigned")
