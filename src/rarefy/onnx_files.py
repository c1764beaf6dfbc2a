"""ONNX files: a finalized model for any runtime, written only after a runtime has answered as PyTorch does."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rarefy._files import write_atomically
from rarefy._forward import arguments
from rarefy._transformer import traceable_transformers

#: Largest difference from PyTorch that is still rounding, as a share of the largest output.
TOLERANCE = 1e-4
#: Largest error of PyTorch itself that rounding may make of an ill-conditioned network: beyond, it answers at random.
_ILL = 1e-2


def require_exporter() -> None:
    """Raise ImportError if what PyTorch's exporter needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {' and '.join(missing)}: pip install 'rarefy[export]'")


def save_onnx(
    model: nn.Module, example_input: Tensor | tuple[Any, ...] | Mapping[str, Any], path: str | Path
) -> float | None:
    """Write a model as ONNX by PyTorch's dynamo exporter, with any batch size; normalisations are folded into weights.

    The model is exported in evaluation mode and not changed. The file is checked in onnxruntime on two batch sizes
    before it replaces what was at ``path``; without onnxruntime it is written unchecked.

    Args:
        model: a finalized model, of tensors of any dtype with the batch in front. It gives a tensor, or a tuple, list
            or dict of tensors.
        example_input: the input (B, ...), a tuple of inputs, or a dict of keyword arguments. The values of floating
            point do not matter; those of integers must be ones that the model takes, such as token ids.
        path: the file, by custom NAME.onnx.

    Returns:
        The largest difference between onnxruntime's and PyTorch's outputs on random inputs, as a share of the largest
        output; None if onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: model is no module, or example_input is none of these.
        ValueError: it holds something else than tensors with a sample in their first dimension.
        RuntimeError: PyTorch cannot export the model, or onnxruntime's answers are others; no file is written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = arguments(example_input)
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(
                f"save_onnx takes tensors with the batch in front, got {value!r:.80} in example_input: leave it out"
            )
    require_exporter()
    was_training = {module: module.training for module in model.modules()}
    found: list[float | None] = []

    def write(partial: Path) -> None:
        names = _export(model, args, kwargs, partial)
        found.append(_difference(model, args, kwargs, names, partial))

    try:
        write_atomically(Path(path), write)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return found[0]


class _ByPosition(nn.Module):
    """A model that is given keyword arguments, by position: torch.export has no batch sizes for ``**kwargs``."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Tensor) -> Any:
        """What the model gives."""
        return self.model(**dict(zip(self.names, args, strict=True)))


def _export(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], path: Path) -> list[str]:
    """Write the file; gives the names of its inputs in the order of the arguments."""
    batch_args, batch_kwargs = _batch(args, kwargs, 2, None)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch")
    names = list(kwargs) or (["input"] if len(args) == 1 else [f"input_{i}" for i in range(len(args))])
    with torch.no_grad():
        answer = model.eval()(*batch_args, **batch_kwargs)
    outputs = _tensors(answer)
    traced, parameters = model, inspect.signature(model.forward).parameters.values()
    if kwargs and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        traced, batch_args, batch_kwargs = _ByPosition(model, names).eval(), tuple(batch_kwargs.values()), {}
    bound = inspect.signature(traced.forward).bind(*batch_args, **batch_kwargs).arguments
    with _quiet(), traceable_transformers():
        try:
            program = torch.onnx.export(
                traced,
                batch_args,
                kwargs=batch_kwargs,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))],
                dynamic_shapes=tree_map(lambda _: {0: batch}, dict(bound)),
            )
        except torch.onnx.OnnxExporterError as error:
            why = str(error.__cause__ or error).strip().splitlines()[0]
            raise RuntimeError(
                f"save_onnx: PyTorch cannot export {type(model).__name__} (finalize() it first if it is being made"
                f" sparse): {why}"
            ) from error
        assert program is not None
        program.save(path)
    return names


def _tensors(answer: Any) -> list[Tensor]:
    """The outputs of a model in order: those of a tuple, a list or a dict."""
    found = [each for each in tree_leaves(answer) if each is not None]
    if not found or not all(isinstance(each, Tensor) for each in found):
        kinds = sorted({type(each).__name__ for each in found})
        raise ValueError(f"save_onnx takes models that give tensors, got {', '.join(kinds) or 'nothing'}")
    return found


def _batch(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor], size: int, generator: torch.Generator | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs of so many samples: the example's, with random numbers in floating point if there is a generator."""

    def sized(x: Tensor) -> Tensor:
        x = x.detach().cpu()
        many: Tensor = x.repeat(-(-size // len(x)), *[1] * (x.dim() - 1))[:size]
        if generator is None or not many.is_floating_point():
            return many
        return torch.randn(many.shape, generator=generator).to(many.dtype)

    return tuple(sized(x) for x in args), {name: sized(x) for name, x in kwargs.items()}


def _difference(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], names: list[str], path: Path
) -> float | None:
    """Between onnxruntime and PyTorch, as a share of the largest output; None without onnxruntime.

    Where they differ by more than rounding, float64 is the judge: a file about as close to it as PyTorch is right.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common; bfloat16 is what it mostly has no operator for
        why = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"onnxruntime {onnxruntime.__version__} cannot run {type(model).__name__} as exported, so save_onnx did not"
            f" write the file (try model.float()): {why}"
        ) from error
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in (1, 3):
        given_args, given_kwargs = _batch(args, kwargs, size, generator)
        given = dict(zip(names, (*given_args, *given_kwargs.values()), strict=True))
        with torch.no_grad():
            expected = _tensors(model(*given_args, **given_kwargs))
        taken = {each.name for each in session.get_inputs()}
        feeds = {name: _ortvalue(x) for name, x in given.items() if name in taken}
        answers = [_from_ortvalue(each) for each in session.run_with_ort_values(None, feeds)]
        difference = max(map(_apart, answers, expected))
        tolerance = max(TOLERANCE, *(2 * _epsilon(y) for y in expected))
        if not difference <= tolerance:
            exact = _in_float64(model, given_args, given_kwargs)
            own = max(map(_apart, expected, exact))
            if not (own <= _ILL and max(map(_apart, answers, exact)) <= 4 * own + tolerance):
                raise RuntimeError(
                    f"onnxruntime {onnxruntime.__version__} answers differently from PyTorch, by {difference:.3g} of"
                    f" the largest output (at most {tolerance:g} is rounding): save_onnx did not write the file"
                )
        largest = max(largest, difference)
    return largest


def _in_float64(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    with torch.no_grad():
        judge = copy.deepcopy(model).double()
        return _tensors(judge(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()}))


def _apart(answer: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number expected; infinity where shapes differ."""
    if answer.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((answer.double() - expected.double()).abs().max() / scale)


def _epsilon(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def _ortvalue(x: Tensor) -> Any:
    import onnxruntime

    if x.dtype is torch.bfloat16:  # NumPy has none: its bits, and their kind in ONNX
        bits = x.contiguous().view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())


def _from_ortvalue(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        answer: Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return answer
    return torch.from_numpy(value.numpy())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about itself and about packages that it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
