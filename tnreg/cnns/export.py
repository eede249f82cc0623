"""Networks on their way out: ONNX, ``torch.export`` and plain weights, to be read without tnreg."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tnreg.cnns.classifier import ConvAC
from tnreg.cnns.convnet import ConvNet
from tnreg.errors import DataError, OptionError
from tnreg.machine.files import write_whole

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
        The path.

    Raises:
        OptionError: Complex weights, a module that needs an example, or the extra ``onnx`` is missing.
        DataError: onnxruntime gives other values than the network.
        FileError: The file cannot be written.

    Cost: a second or more for tracing; the file holds the weights.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        if check:
            import onnxruntime
    except ImportError as error:
        raise OptionError(f"{error.name} is missing: pip install 'tnreg[onnx]'") from None
    single, inputs = _prepared(net, example)
    names = ["x"] if isinstance(inputs, Tensor) else [f"x{n}" for n in range(len(inputs))]
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of the exporter's own making
        program = _traced(
            torch.onnx.export,
            single, (inputs,), dynamo=True, dynamic_shapes=(_dynamic(inputs),), verbose=False,
            input_names=names, output_names=["y"], external_data=False,
        )  # fmt: skip
    assert program is not None

    def write(beside: Path) -> None:
        program.save(str(beside), external_data=False)
        if not check:
            return
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            beside.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        fresh = _fresh(single, inputs)
        parts = [fresh] if isinstance(fresh, Tensor) else fresh
        given = {i.name: p.numpy() for i, p in zip(session.get_inputs(), parts, strict=True)}
        [found] = session.run(None, given)
        _compare(single, fresh, torch.from_numpy(found), path)

    return write_whole(path, write)


def export_pt2(
    net: nn.Module, path: str | os.PathLike[str], *, example: Any = None, check: bool = True
) -> Path:
    """Write a network as a ``torch.export`` program with a dynamic batch; ``torch.export.load`` reads it.

    Args:
        net: A ``ConvNet``, a ``ConvAC``, or any module together with ``example``.
        path: The file (``.pt2``); it appears whole or not at all.
        example: As for ``export_onnx``.
        check: Load the file again and compare its values on fresh inputs.

    Raises:
        OptionError: A module that needs an example.
        DataError: The loaded program gives other values.
        FileError: The file cannot be written.
    """
    single, inputs = _prepared(net, example, single=False)
    program = _traced(torch.export.export, single, (inputs,), dynamic_shapes=(_dynamic(inputs),))

    def write(beside: Path) -> None:
        whole = beside.with_name(beside.name + ".pt2")  # torch insists on the ending
        try:
            torch.export.save(program, whole)
            os.replace(whole, beside)
        finally:
            whole.unlink(missing_ok=True)
        if check:
            with beside.open("rb") as file:
                loaded = load_pt2(file)
            fresh = _fresh(single, inputs)
            _compare(single, fresh, loaded(fresh).detach(), path)

    return write_whole(path, write)


def load_pt2(file: Path | IO[bytes]) -> nn.Module:
    """The network in a file of ``torch.export``; what torch 2.9 warns of there is nobody's to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        loaded: nn.Module = torch.export.load(file).module()
    return loaded


def export_state(net: ConvNet | ConvAC, path: str | os.PathLike[str]) -> Path:
    """Write the weights of a network as safetensors, with its layers as JSON in the metadata.

    Every layer of the JSON names its weights, nodes, join and channels: enough to build the network
    elsewhere. A locally connected layer's weights are ``(positions, channels in, channels out)``, a shared
    one's those of a 1x1 convolution.

    Raises:
        OptionError: Another kind of module.
        FileError: The file cannot be written.
    """
    _known(net)
    inner = net.net if isinstance(net, ConvAC) else net
    prefix = "net.convs." if isinstance(net, ConvAC) else "convs."
    layers = [
        {"weight": f"{prefix}{name}.weight", "layer": inner.layer_of(nodes[0]), "join": join,
         "nodes": [str(node) for node in nodes],
         "children": [[str(c) for c in inner.tree.children(node)] for node in nodes]}
        for name, join, nodes in inner.layers()
    ]  # fmt: skip
    about: dict[str, Any] = {"outputs": inner.outputs, "share": inner.share, "layers": layers}
    if isinstance(net, ConvAC):
        about |= {"representation": net.representation.settings(), "scores": net.scores,
                  "temperature": net.temperature}  # fmt: skip
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    text = {"network": json.dumps(about)}
    return write_whole(
        path, lambda beside: safetensors.torch.save_file(state, beside, metadata=text)
    )


def example_inputs(net: ConvNet | ConvAC, batch: int = 2) -> Any:
    """Normal random inputs of the right shape: a tensor, or N tensors for unequal sizes.

    Raises:
        OptionError: A classifier whose images have a shape that is not known.
    """
    random = torch.Generator().manual_seed(batch)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random).to(net_dtype).to(inner.device)

    inner = net.net if isinstance(net, ConvAC) else net
    net_dtype = inner.dtype
    if isinstance(net, ConvAC):
        if inner.shape is None:
            raise OptionError(
                "the shape of this classifier's images is not known, as its tree is no ModeTree.grid; "
                "give example=images, or make the network with ConvNet(..., shape=(height, width))"
            )
        rows, columns = net.representation.patch
        return drawn(net.representation.channels, rows * inner.shape[0], columns * inner.shape[1])
    if len(set(inner.sizes)) > 1:
        return [drawn(size) for size in inner.sizes]
    return drawn(inner.sizes[0], *(inner.shape or (inner.tree.order,)))


def _prepared(net: nn.Module, example: Any, *, single: bool = True) -> tuple[nn.Module, Any]:
    """A copy on the CPU (in float32), not training, and inputs for it."""
    if example is None:
        _known(net)
        example = example_inputs(net)  # type: ignore[arg-type]
    parts = [example] if isinstance(example, Tensor) else list(example)
    if not parts or any(not isinstance(p, Tensor) or p.ndim < 1 or len(p) < 2 for p in parts):
        raise OptionError("example must be a tensor, or a list of tensors, of two samples or more.")
    if single and any(p.is_complex() for p in net.parameters()):
        raise OptionError("ONNX has no complex numbers; export_pt2 writes complex networks.")
    module = copy.deepcopy(net).cpu().eval()
    ready = [p.detach().cpu() for p in parts]
    if single:
        module, ready = module.float(), [p.float() if p.is_floating_point() else p for p in ready]
    inputs = ready[0] if isinstance(example, Tensor) else ready
    try:
        with torch.no_grad():
            module(inputs)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise OptionError(
            f"the network does not take the example of shapes {[tuple(p.shape) for p in ready]}.\n"
            f"  {str(error).splitlines()[0]}"
        ) from None
    return module, inputs


def _traced(exporter: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return exporter(*arguments, **options)
    except Exception as error:  # whatever the exporters of torch raise, in many versions
        raise OptionError(
            f"torch {torch.__version__} cannot export this network with a dynamic batch: "
            f"{type(error).__name__}.\n  {str(error).splitlines()[0] if str(error) else ''}\n"
            "  for networks of tnreg this was seen to work with torch 2.13 and to fail with 2.6"
        ) from error


def _known(net: Any) -> None:
    if not isinstance(net, ConvNet | ConvAC):
        raise OptionError(
            f"found {type(net).__name__}; give a ConvNet (tnreg.to_cnn(model)) or a ConvAC, or, for "
            "another module, example=inputs"
        )


def _dynamic(inputs: Any) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return {0: batch} if isinstance(inputs, Tensor) else [{0: batch} for _ in inputs]


def _fresh(module: nn.Module, inputs: Any) -> Any:
    """Other inputs of the same kind, with one sample more; of a size that keeps values in range."""
    random = torch.Generator().manual_seed(1)

    def other(x: Tensor) -> Tensor:
        more = torch.randn((len(x) + 1, *x.shape[1:]), generator=random)
        return (more * x.detach().float().std() if not x.is_complex() else more).to(x.dtype)

    found = [other(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    if isinstance(module, ConvNet):
        with torch.no_grad():
            values, log = module.scaled_values(found[0] if isinstance(inputs, Tensor) else found)
        if log is not None:
            sizes = (values.abs().reshape(len(log), -1).amax(1) + 1e-30).log2() + log
            factor = 2.0 ** float(-sizes.median() / module.tree.order)
            found = [factor * x for x in found]
    return found[0] if isinstance(inputs, Tensor) else found


def _compare(module: nn.Module, fresh: Any, found: Tensor, path: Any) -> None:
    with torch.no_grad():
        wanted = module(fresh)
    difference = float((found - wanted).abs().max())
    scale = float(wanted.abs().max())
    if not 0 < scale < math.inf:
        raise DataError(
            f"not written: the network's values leave the range of {wanted.dtype} on random inputs, so that "
            f"{path} cannot be checked; check=False writes it all the same."
        )
    if not difference <= _TOLERANCE * scale:
        raise DataError(
            f"not written: {path} would give other values than the network.\n"
            f"  largest difference {difference:.3g} where values reach {scale:.3g}"
        )


class _quiet:
    """The exporter's log messages go nowhere."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
