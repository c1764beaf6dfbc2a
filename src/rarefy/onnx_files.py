"""ONNX files: a finalized model for any runtime, written only after a runtime has answered as PyTorch does."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy._files import write_atomically

#: Largest difference from PyTorch that is still rounding, as a share of the largest output.
TOLERANCE = 1e-4


def require_exporter() -> None:
    """Raise ImportError if what PyTorch's exporter needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {' and '.join(missing)}: pip install 'rarefy[export]'")


def save_onnx(model: nn.Module, example_input: Tensor, path: str | Path) -> float | None:
    """Write a model as ONNX by PyTorch's dynamo exporter, with any batch size; normalisations are folded into weights.

    The model is exported in evaluation mode and not changed. The file is checked in onnxruntime on two batch sizes
    before it replaces what was at ``path``; without onnxruntime it is written unchecked.

    Args:
        model: a finalized model of one tensor, to one tensor, both with the batch in front.
        example_input: (B, ...), whose values do not matter.
        path: the file, by custom NAME.onnx.

    Returns:
        The largest difference between onnxruntime's and PyTorch's outputs on random inputs, as a share of the largest
        output; None if onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: PyTorch cannot export the model, or onnxruntime's answers are others; no file is written.
    """
    require_exporter()
    was_training = {module: module.training for module in model.modules()}
    found: list[float | None] = []

    def write(partial: Path) -> None:
        _export(model, example_input, partial)
        found.append(_difference(model, example_input, partial))

    try:
        write_atomically(Path(path), write)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return found[0]


def _export(model: nn.Module, example_input: Tensor, path: Path) -> None:
    # A batch of one would be taken for a constant.
    batch = example_input[:1].repeat(2, *[1] * (example_input.dim() - 1))
    shapes = ({0: torch.export.Dim("batch")},)
    with _quiet():
        try:
            program = torch.onnx.export(
                model.eval(),
                (batch,),
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=shapes,
            )
        except torch.onnx.OnnxExporterError as error:
            why = str(error.__cause__ or error).strip().splitlines()[0]
            raise RuntimeError(f"PyTorch cannot export {type(model).__name__} to ONNX: {why}") from error
        assert program is not None
        program.save(path)


def _difference(model: nn.Module, example_input: Tensor, path: Path) -> float | None:
    """Between onnxruntime and PyTorch, as a share of the largest output; None without onnxruntime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in (1, 3):
        x = torch.randn(batch, *example_input.shape[1:], generator=generator)
        with torch.no_grad():
            expected = model(x)
        (answer,) = session.run(None, {"input": x.numpy()})
        scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((torch.from_numpy(answer) - expected).abs().max() / scale)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"onnxruntime {onnxruntime.__version__} answers differently from PyTorch, by {difference:.3g} of the"
                f" largest output (at most {TOLERANCE:g} is rounding): the file was not written"
            )
        largest = max(largest, difference)
    return largest


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
