"""Commands about networks: ``export``, ``probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tnreg import (
    ConvAC,
    ConvNet,
    LocalityProfile,
    export_onnx,
    export_pt2,
    export_state,
    load,
    locality_profile,
    plots,
    to_cnn,
)
from tnreg.cli.reply import Reply, check_place, new_axes
from tnreg.cnns.classifier import is_classifier
from tnreg.errors import OptionError
from tnreg.experiments.probed import images_of, network_of


def export(
    model: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "state"] = "onnx",
    out: Path | None = None,
    share: bool = False,
    classes: bool = False,
) -> None:
    """Write the convolutional network that a saved model is, for programs that do not know tnreg.

    Args:
        model: A .safetensors file: a factorization that tnreg saved, or a classifier of `run convac`.
        format: ONNX, a torch.export program, or plain weights as safetensors with layers in the metadata.
        out: The file; beside the model with the format's ending if left out.
        share: One convolution per layer, if the factorization's weights are equal at the nodes of a height.
        classes: The factorization's last mode are the outputs.
    """
    reply = Reply()
    check_place(out, "--out")
    found: ConvNet | ConvAC
    with reply.working(f"reading {model} ..."):
        if is_classifier(model):
            if share or classes:
                raise OptionError(
                    f"--share and --classes are for factorizations; {model} is a classifier, whose network "
                    "knows both."
                )
            found = ConvAC.load(model)
        else:
            found = to_cnn(load(model), share=share, classes=classes)
    endings = {"onnx": ".onnx", "pt2": ".pt2", "state": ".network.safetensors"}
    target = out or model.with_suffix(endings[format])
    writers: dict[str, Any] = {"onnx": export_onnx, "pt2": export_pt2, "state": export_state}
    reply.text(found)
    with reply.working(f"writing {format} ..."):
        writers[format](found, target)
    checked = "" if format == "state" else ", values checked on fresh inputs"
    reply.note(f"wrote {target}{checked}")


def probe(
    models: tuple[str, ...],
    /,
    *,
    data: str,
    weights: Path | None = None,
    distances: tuple[int, ...] = (),
    size: int | None = None,
    samples: int = 8,
    pairs: int = 32,
    anywhere: bool = False,
    seed: int = 0,
    png: Path | None = None,
    json: bool = False,
) -> None:
    """What trained networks tie together: interaction of two patches against the distance between them.

    Args:
        models: Run folders of single trainings of locality, .pt2 files of torch.export, .safetensors models
            of tnreg; or the name or import path of one network, then with weights.
        data: An image set of tnreg.images (.npz), a file with images (N, C, H, W), or digits:24 for pairs of
            digits that far apart.
        weights: State dict of the network, .safetensors or .pt.
        distances: Pixels between the patches; nine up to the largest if left out.
        size: Side of the patches in pixels; an eighth of the image's shorter side if left out.
        samples: Images whose patches are crossed.
        pairs: Pairs of patches for each distance.
        anywhere: Patches anywhere, not where images differ.
        seed: Draws patches and images; the same for all models.
        png: Draw all models into this file.
        json: Print one JSON document in place of the tables.
    """
    if not models or (weights is not None and len(models) > 1):
        raise OptionError("probe: name one model or more; with --weights exactly one.")
    reply = Reply(json)
    check_place(png, "--png")
    with reply.working("reading images ..."):
        pictures = images_of(data)
    found = {}
    for name in models:
        try:
            with reply.undisturbed():
                with reply.working(f"reading {name} ..."):
                    net = network_of(name, pictures.shape[1], weights=weights)
                found[name] = locality_profile(
                    net, pictures, distances=distances or None, size=size, samples=samples, pairs=pairs,
                    where="anywhere" if anywhere else "differing", seed=seed, progress=reply.shows(),
                )  # fmt: skip
        except (RuntimeError, AssertionError) as error:
            raise OptionError(
                f"{name} does not take images of shape {tuple(pictures.shape[1:])}.\n"
                f"  {str(error).splitlines()[0]}"
            ) from None
        reply.text(f"{name}, patches of {found[name].size}x{found[name].size} pixels")
        reply.text(found[name])
    if png is not None:
        with reply.working("drawing ..."):
            plots.save_figure(plots.locality_profile(found, new_axes()).figure, png)
        reply.note(f"wrote {png}")
    reply.document({"data": data, "models": [_profile(*one) for one in found.items()]})


def _profile(name: str, found: LocalityProfile) -> dict[str, Any]:
    """One model's table: means over the pairs of patches, and the standard error."""
    columns = (found.distances, found.interaction, found.standard_error, found.effective_rank)
    rows = [
        {
            "distance": distance,
            "interaction": share.mean(),
            "standard error": error,
            "effective rank": rank.mean(),
        }
        for distance, share, error, rank in zip(*columns, strict=True)
    ]
    return {"model": name, "size": found.size, "distances": rows}
