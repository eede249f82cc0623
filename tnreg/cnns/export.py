"""Networks written as ONNX, ``torch.export`` programs and plain weights, to be read without tnreg."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from tnreg.cnns.classifier import ConvAC
from tnreg.cnns.convnet import ConvNet
from tnreg.errors import DataError, OptionError, blame
from tnreg.machine.files import write_safetensors, write_whole

# Largest difference to the exported file's values in float32, relative to the largest of them.
_TOLERANCE = 1e-4


def export_onnx(
    net: nn.Module, path: str | os.PathLike[str], *, example: Any = None, check: bool = True
) -> Path:
    """Write a network as an ONNX file with a dynamic batch, in float32.

    Args:
        net: A ``ConvNet``, a ``ConvAC``, or any module together with ``example``.
        path: The file; it appears whole or not at all.
        example: Inputs with two samples or more: a tensor, or for unequal sizes a list of tensors. Made
            from the network's own sizes if left out.
        check: Run the file with onnxruntime on fresh inputs, with another number of samples, before it
            is put in place.

    Returns:
        The path. Tracing takes a second or more.

    Raises:
        OptionError: Complex weights, a module that needs an example, or the extra ``onnx`` is missing.
        DataError: onnxruntime gives other values than the network.
        FileError: The file cannot be written.
    """
    try:
        for name in ("onnx", "onnxscript", "onnxruntime")[: 3 if check else 2]:
            importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"{error.name} is missing: pip install 'tnreg[onnx]'") from None
    if any(p.is_complex() for p in net.parameters()):
        message = "ONNX has no complex numbers; export_pt2 writes complex networks."
        raise OptionError(message, argument="net")
    module, inputs = _prepare(net, example, torch.float32)
    names = ["x"] if isinstance(inputs, Tensor) else [f"x{n}" for n in range(len(inputs))]
    logged = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # users cannot act on what the exporter says
        logging.disable(logging.WARNING)
        try:
            program = _trace(
                torch.onnx.export, module, inputs, dynamo=True, verbose=False, input_names=names,
                output_names=["y"], external_data=False,
            )  # fmt: skip
        finally:
            logging.disable(logged)

    def write(file: Path) -> None:
        program.save(str(file), external_data=False)
        if check:
            _compare(module, inputs, functools.partial(_run_onnx, file), path)

    return write_whole(path, write)


def _run_onnx(file: Path, inputs: Any) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=providers)
    parts = [inputs] if isinstance(inputs, Tensor) else inputs
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), parts, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def export_pt2(
    net: nn.Module, path: str | os.PathLike[str], *, example: Any = None, check: bool = True
) -> Path:
    """Write a network as a ``torch.export`` program with a dynamic batch; ``torch.export.load`` reads it.

    Arguments and errors are those of ``export_onnx``, but weights may be complex, numbers keep their dtype,
    and ``check`` loads the file again and compares its values on fresh inputs.
    """
    module, inputs = _prepare(net, example)
    program = _trace(torch.export.export, module, inputs)

    def write(file: Path) -> None:
        raw = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.export.save(program, raw)
        file.write_bytes(raw.getbuffer())
        if check:
            with file.open("rb") as stream:
                loaded = load_pt2(stream)
            _compare(module, inputs, lambda fresh: loaded(fresh).detach(), path)

    return write_whole(path, write)


def load_pt2(file: Path | IO[bytes]) -> nn.Module:
    """Return the network in a file of ``torch.export``, without a warning that users cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.9
        return torch.export.load(file).module()


def export_state(net: ConvNet | ConvAC, path: str | os.PathLike[str]) -> Path:
    """Write plain weights as safetensors, and what they belong to as JSON under "network" in the metadata.

    Every layer of the JSON names its weights, nodes, join and channels: enough to build the network
    elsewhere. A locally connected layer's weights are ``(positions, channels in, channels out)``, a shared
    one's those of a 1x1 convolution.

    Raises:
        OptionError: Another kind of module.
        FileError: The file cannot be written.
    """
    inner = _conv_net(net)
    prefix = "convs." if inner is net else "net.convs."
    layers = [
        {"weight": f"{prefix}{name}.weight", "layer": inner.layer_of(nodes[0]), "join": join,
         "nodes": [str(node) for node in nodes],
         "children": [[str(c) for c in inner.tree.children(node)] for node in nodes]}
        for name, join, nodes in inner.layers()
    ]  # fmt: skip
    about = {"outputs": inner.outputs, "share": inner.share, "layers": layers}
    about |= net.settings() if isinstance(net, ConvAC) else {}
    return write_safetensors(path, net.state_dict(), "network", about)


def example_inputs(net: ConvNet | ConvAC, batch: int = 2) -> Any:
    """Return random inputs of the right shape: a tensor, or N tensors for unequal sizes.

    They are normal, for classifiers between ``low`` and ``high`` of their representation.

    Raises:
        OptionError: Another kind of module, or a classifier whose images have a shape that is not known.
    """
    inner, random = _conv_net(net), torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random).to(inner.dtype).to(inner.device)

    if isinstance(net, ConvAC):
        if inner.shape is None:
            raise OptionError(
                "the shape of this classifier's images is not known, as its tree is no ModeTree.grid; "
                "give example=images, or make the network with ConvNet(..., shape=(height, width))"
            )
        rows, columns = net.representation.patch
        images = draw(net.representation.channels, rows * inner.shape[0], columns * inner.shape[1])
        return _pixels(net, images)
    if len(set(inner.sizes)) > 1:
        return [draw(size) for size in inner.sizes]
    return draw(inner.sizes[0], *(inner.shape or (inner.tree.order,)))


def _pixels(net: ConvAC, noise: Tensor) -> Tensor:
    """Return noise as pixels in the range of the templates: outside of it all of them may be 0."""
    low, high = net.representation.low, net.representation.high
    return low + (high - low) * noise.sigmoid()


@blame("net")
def _conv_net(net: Any) -> ConvNet:
    """Return the network, or that of a classifier."""
    if not isinstance(net, ConvNet | ConvAC):
        raise OptionError(
            f"found {type(net).__name__}; give a ConvNet (tnreg.to_cnn(model)) or a ConvAC, or, for "
            "another module, example=inputs"
        )
    return net.net if isinstance(net, ConvAC) else net


def _each(change: Callable[[Tensor], Any], inputs: Any) -> Any:
    return change(inputs) if isinstance(inputs, Tensor) else [change(x) for x in inputs]


@blame("example")
def _prepare(net: nn.Module, example: Any, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Return a copy on the CPU, not training, and inputs for it; both in ``dtype`` if it is given."""
    inputs = example_inputs(net) if example is None else example  # type: ignore[arg-type]
    parts = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not parts or any(not isinstance(p, Tensor) or p.ndim < 1 or len(p) < 2 for p in parts):
        raise OptionError("example must be a tensor, or a list of tensors, of two samples or more.")
    module = copy.deepcopy(net).cpu().eval().to(dtype)
    inputs = _each(lambda x: x.detach().cpu().to(dtype if x.is_floating_point() else None), inputs)
    try:
        with torch.no_grad():
            module(inputs)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise OptionError(
            f"the network does not take the example of shapes {[tuple(p.shape) for p in parts]}.\n"
            f"  {str(error).splitlines()[0]}"
        ) from None
    return module, inputs


def _trace(exporter: Callable[..., Any], module: nn.Module, inputs: Any, **options: Any) -> Any:
    batch = torch.export.Dim("batch", min=1)
    shapes = (_each(lambda _: {0: batch}, inputs),)
    try:
        return exporter(module, (inputs,), dynamic_shapes=shapes, **options)
    except Exception as error:  # whatever the exporters of torch raise, in many versions
        raise OptionError(
            f"torch {torch.__version__} cannot export this network with a dynamic batch: "
            f"{type(error).__name__}.\n  {str(error).splitlines()[0] if str(error) else ''}\n"
            "  for networks of tnreg this was seen to work with torch 2.13 and to fail with 2.6"
        ) from error


def _fresh(module: nn.Module, inputs: Any) -> Any:
    """Return random inputs of the same kind, one sample more, of a size that keeps values in range."""
    random = torch.Generator().manual_seed(1)

    def draw(x: Tensor) -> Tensor:
        noise = torch.randn((len(x) + 1, *x.shape[1:]), generator=random)
        return (noise if x.is_complex() else noise * x.float().std()).to(x.dtype)

    fresh = _each(draw, inputs)
    if isinstance(module, ConvAC):
        return _pixels(module, fresh)
    if isinstance(module, ConvNet):
        with torch.no_grad():
            values, log = module.scaled_values(fresh)
        if log is not None:
            sizes = (values.abs().reshape(len(log), -1).amax(1) + 1e-30).log2() + log
            factor = 2.0 ** float(-sizes.median() / module.tree.order)
            fresh = _each(lambda x: factor * x, fresh)
    return fresh


def _compare(
    module: nn.Module, inputs: Any, values: Callable[[Any], Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse a file that gives other values than the module on inputs that were not used to trace it."""
    fresh = _fresh(module, inputs)
    with torch.no_grad():
        expected = module(fresh)
    scale = float(expected.abs().max())
    difference = float((values(fresh) - expected).abs().max())
    if not 0 < scale < math.inf:
        raise DataError(
            f"not written: the network's values leave the range of {expected.dtype} on random inputs, so "
            f"that {path} cannot be checked; check=False writes it all the same."
        )
    if not difference <= _TOLERANCE * scale:
        raise DataError(
            f"not written: {path} would give other values than the network.\n"
            f"  largest difference {difference:.3g} where values reach {scale:.3g}"
        )
