"""st.export_onnx: a model as one ONNX file, which is checked against the model before it counts."""

from __future__ import annotations

import inspect
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from sparsetrain.batches import called
from sparsetrain.candidates import unwrapped
from sparsetrain.evaluating import evaluation_mode, ordinary_attention
from sparsetrain.keeping import whole_file
from sparsetrain.storage.csr.layers import SparseLayer

#: An ONNX file is one protobuf message, which cannot be longer.
_LONGEST = 2**31


@dataclass(frozen=True)
class OnnxResult:
    """An ONNX file that was checked.

    Attributes:
        path: of the file.
        bytes: its length.
        difference: largest one between an output in onnxruntime and in torch, divided by the
            largest number in that output.
    """

    path: Path
    bytes: int
    difference: float


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> OnnxResult:
    """Write a model as one ONNX file, once onnxruntime computes the same with it as torch.

    The model is exported as it is in evaluation mode, by `torch.onnx.export(dynamo=True)`, and run
    on the CPU. Zeros among its weights are stored and multiplied like other numbers.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, for one
            call of the model and where the model is. What is no tensor becomes part of the file.
        path: of the file, which is written whole or not at all. Its folder is made.
        dynamic_batch: whether dimension 0 of every tensor among the inputs may be of any size. The
            check then runs the model on one sample and on one more than in the example, too.
        tolerance: largest difference allowed, as a share of the largest number in that output.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        TypeError: the inputs do not fit the model's `forward`.
        ValueError: the model holds its weights in a form that ONNX does not have, is 2 GiB or more,
            or cannot be exported; onnxruntime cannot run it, or computes something else.
    """
    runtime = _runtime()
    model, path = unwrapped(model), Path(path)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more")
    _check(model)
    calls = _calls(model, example_inputs, dynamic_batch)
    # What torch exports is the ordinary attention, so that is compared.
    with (
        whole_file(path) as partial,
        evaluation_mode(model),
        ordinary_attention(),
        torch.no_grad(),
    ):
        partial.write_bytes(_exported(model, calls[-1], dynamic_batch))
        session = _session(runtime, partial)
        difference = max(_difference(session, model, call, tolerance) for call in calls)
    return OnnxResult(path, path.stat().st_size, difference)


def _runtime() -> Any:
    try:
        for package in ("onnx", "onnxscript"):
            import_module(package)
        return import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            "exporting to ONNX needs onnx, onnxscript and onnxruntime: "
            'pip install "sparsetrain[onnx]"'
        ) from error


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or 'the model'} is behind a parametrization: finalize() the optimizer or "
                "remove it first"
            )
        if isinstance(module, SparseLayer):
            raise ValueError(
                f"{name or 'the model'} is in csr storage, which ONNX does not have: finalize() "
                "the optimizer first, or export the model as it was before st.compress"
            )
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if held >= _LONGEST:
        raise ValueError(f"the model is {held} bytes long; an ONNX file holds less than 2 GiB")


def _calls(
    model: nn.Module, example_inputs: Any, dynamic_batch: bool
) -> list[inspect.BoundArguments]:
    """Arguments to check the model with. The last ones are traced.

    They have more than one sample where any number is allowed, because torch takes a dimension of
    size 1 for one that always is.
    """
    call: inspect.BoundArguments = called(inspect.signature(model.forward).bind, example_inputs)
    if not dynamic_batch:
        return [call]
    samples = _samples(call)
    return [call, _with_samples(call, 1), _with_samples(call, samples + 1)]


def _samples(call: inspect.BoundArguments) -> int:
    sizes = {len(tensor) for tensor in _tensors(call.arguments) if tensor.dim()}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(call.arguments))
        raise ValueError(
            "dynamic_batch needs inputs that have their samples along dimension 0, all as many; "
            f"here are {shapes or 'no tensors'}"
        )
    return sizes.pop()


def _with_samples(call: inspect.BoundArguments, samples: int) -> inspect.BoundArguments:
    """The same call with so many samples: the first ones, from the start again if need be."""

    def resized(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim()):
            return leaf
        return leaf[torch.arange(samples, device=leaf.device) % len(leaf)]

    arguments = pytree.tree_map(resized, dict(call.arguments))
    return inspect.BoundArguments(call.signature, arguments)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _exported(model: nn.Module, call: inspect.BoundArguments, dynamic_batch: bool) -> bytes:
    """What the file holds."""

    def dynamic(leaf: Any) -> Any:
        has_samples = isinstance(leaf, Tensor) and leaf.dim()
        return {0: torch.export.Dim.DYNAMIC} if has_samples else None

    shapes = pytree.tree_map(dynamic, dict(call.arguments)) if dynamic_batch else None
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                # Keyword arguments come last, or it takes a last argument that is a dict for them.
                (*call.args, call.kwargs),
                dynamo=True,
                verbose=False,
                dynamic_shapes=shapes,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"the model cannot be exported: {error.__cause__ or error}") from error
    assert program is not None  # it is for dynamo=False
    # Every node has the stack that made it, with the names of this machine's folders.
    import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of initializers that it has no need of
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"onnxruntime cannot load the exported model: {error}") from error


def _difference(
    session: Any, model: nn.Module, call: inspect.BoundArguments, tolerance: float
) -> float:
    """The largest one among all outputs, each as a share of the largest number in its output.

    Raises:
        ValueError: it is above the tolerance, or outputs have other shapes.
    """
    expected = _tensors(model(*call.args, **call.kwargs))
    found = _run(session, _tensors((call.args, call.kwargs)))
    wrong = f"the exported model is wrong: for inputs of shapes {_shapes(_tensors(call.arguments))}"
    if _shapes(expected) != _shapes(found):
        raise ValueError(
            f"{wrong} its outputs have shapes {_shapes(found)} instead of {_shapes(expected)}"
        )
    shares = [_share(ours, theirs) for ours, theirs in zip(expected, found, strict=True)]
    largest = max(shares, default=0.0)
    if largest > tolerance:
        raise ValueError(
            f"{wrong} an output differs from torch's by {largest:.1e} of its largest number, which "
            f"is above tolerance={tolerance}"
        )
    return largest


def _run(session: Any, inputs: list[Tensor]) -> list[Tensor]:
    names = [given.name for given in session.get_inputs()]
    try:
        arrays = [tensor.detach().cpu().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"onnxruntime cannot run the exported model: {error}") from error
    return [torch.as_tensor(output) for output in outputs]


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _share(expected: Tensor, found: Tensor) -> float:
    """Largest difference by the largest finite number; NaN and infinities have to be the same."""
    if not expected.numel():
        return 0.0
    expected, found = expected.cpu().double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    gaps = (expected - found).abs().masked_fill(same, 0)
    difference = gaps.masked_fill(gaps.isnan(), math.inf).max().item()
    scale = expected.abs().masked_fill(~expected.isfinite(), 0).max().item()
    if not difference:
        return 0.0
    return difference / scale if scale else math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Two messages of torch's exporter about itself are left out."""

    def is_news(record: logging.LogRecord) -> bool:
        # Said of operators that only models with torchvision's have.
        return "torchvision is not installed" not in record.getMessage()

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            # The exporter copies specs of trees in a way that torch has deprecated.
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            yield
    finally:
        logger.removeFilter(is_news)
