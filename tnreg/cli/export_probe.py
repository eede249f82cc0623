"""The commands ``export`` and ``probe``, which are about networks."""

from pathlib import Path
from typing import Any, Literal

import tnreg
from tnreg import ConvAC, ConvNet, LocalityProfile, plots
from tnreg.cli.output import Picture, Reply
from tnreg.cnns.classifier import is_classifier
from tnreg.errors import OptionError, blame
from tnreg.experiments.probed import images_of, network_of

_FORMATS: dict[str, tuple[str, Any]] = {
    "onnx": (".onnx", tnreg.export_onnx),
    "pt2": (".pt2", tnreg.export_pt2),
    "state": (".network.safetensors", tnreg.export_state),
}


def export(
    model: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "state"] = "onnx",
    out: Path | None = None,
    share: bool = False,
    classes: bool = False,
) -> None:
    """Write a saved model as a convolutional network, for programs without tnreg.

    Args:
        model: A .safetensors file: a factorization that tnreg saved, or a classifier of `run convac`.
        format: ONNX, a torch.export program, or weights as safetensors with layers in the metadata.
        out: The file; beside the model if left out.
        share: One convolution per layer, if the factorization's weights are equal at all nodes of a height.
        classes: The factorization's last mode is the outputs.
    """
    reply = Reply(out=out)
    with reply.working(f"reading {model} ..."):
        if is_classifier(model):
            if share or classes:
                raise OptionError(f"--share and --classes are for factorizations; {model} is a classifier.")
            net: ConvNet | ConvAC = ConvAC.load(model)
        else:
            net = tnreg.to_cnn(tnreg.load(model), share=share, classes=classes)
    ending, write = _FORMATS[format]
    target = out or model.with_suffix(ending)
    reply.text(net)
    with reply.working(f"writing {format} ..."):
        write(net, target)
    reply.note(f"wrote {target}{', values checked on fresh inputs' * (format != 'state')}")


def probe(
    models: tuple[str, ...],
    /,
    *,
    data: str,
    weights: Path | None = None,
    model: str | None = None,
    trust: bool = False,
    distances: tuple[int, ...] = (),
    size: int | None = None,
    samples: int = 8,
    pairs: int = 32,
    anywhere: bool = False,
    seed: int = 0,
    figure: Picture = None,
    json: bool = False,
) -> None:
    """Measure which patches trained networks tie together: interaction against distance.

    Args:
        models: Run folders of single trainings of locality, .pt2 files of torch.export, .safetensors models
            of tnreg; or one network together with weights: small-cnn, resnet-18, an import path
            (torchvision.models:resnet18) or a name in a file (mine.py:Net).
        data: An image set of tnreg.images (.npz), a file with images (N, C, H, W), or digits:24 for pairs of
            digits that far apart.
        weights: State dict of the network, .safetensors or .pt.
        model: The network of the run folders, where it is not one of tnreg's own: import path or mine.py:Net.
        trust: Open .pt2 files, whose reader in torch runs code that a file brings along.
        distances: Pixels between the patches; nine up to the largest if left out.
        size: Side of the patches in pixels; an eighth of the image's shorter side if left out.
        samples: Images whose patches are crossed.
        pairs: Pairs of patches for each distance.
        anywhere: Patches anywhere, not only where images differ.
        seed: Draws patches and images; the same for all models.
        figure: Draw all models into this file.
        json: Print one JSON document instead of the tables.
    """
    if not models or (weights is not None and len(models) > 1):
        raise OptionError("probe: name one model or more; with --weights exactly one.")
    reply = Reply(json, figure=figure)
    with reply.working("reading images ..."), blame("data"):
        images = images_of(data)
    profiles = {}
    for name in models:
        try:
            with reply.undisturbed():
                with reply.working(f"reading {name} ..."):
                    net = network_of(name, images.shape[1], weights=weights, model=model, trust=trust)
                profiles[name] = tnreg.locality_profile(
                    net, images, distances=distances or None, size=size, samples=samples, pairs=pairs,
                    where="anywhere" if anywhere else "differing", seed=seed, progress=reply.shows(),
                )  # fmt: skip
        except (RuntimeError, AssertionError) as error:
            raise OptionError(
                f"{name} does not take images of shape {tuple(images.shape[1:])}.\n"
                f"  {str(error).splitlines()[0]}"
            ) from None
        side = profiles[name].size
        reply.text(f"{name}, patches of {side}x{side} pixels\n{profiles[name]}")
    reply.picture(lambda axes: plots.locality_profile(profiles, axes))
    reply.document({"data": data, "models": [_means(*item) for item in profiles.items()]})


def _means(name: str, profile: LocalityProfile) -> dict[str, Any]:
    columns = {
        "distance": profile.distances, "interaction": profile.interaction.mean(1),
        "standard error": profile.standard_error, "effective rank": profile.effective_rank.mean(1),
    }  # fmt: skip
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"model": name, "size": profile.size, "distances": rows}
