"""The commands ``export`` and ``probe``, which are about networks."""

import re
from pathlib import Path
from typing import Any, Literal

import tnreg
from tnreg import ConvAC, ConvNet, InteractionMap, LocalityProfile, ProfileComparison, plots
from tnreg.cli.output import Picture, Reply
from tnreg.cnns.classifier import is_classifier
from tnreg.errors import OptionError, blame
from tnreg.experiments.probed import images_of, logits_at, network_of
from tnreg.trees.drawing import plain_label

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
    output: str | None = None,
    trust: bool = False,
    distances: tuple[int, ...] = (),
    size: int | None = None,
    samples: int = 8,
    pairs: int = 32,
    anywhere: bool = False,
    map: str | None = None,
    seed: int = 0,
    figure: Picture = None,
    json: bool = False,
) -> None:
    """Measure which patches trained networks tie together: interaction against distance.

    What was found is said in words first; of several models, how each differs from the first one.

    Args:
        models: Run folders of single trainings of locality, .pt2 files of torch.export, .safetensors models
            of tnreg; or one network together with weights: small-cnn, resnet-18, an import path
            (torchvision.models:resnet18) or a name in a file (mine.py:Net).
        data: An image set of tnreg.images (.npz), a file with images (N, C, H, W), or digits:24 for pairs of
            digits that far apart.
        weights: State dict of the network, .safetensors or .pt.
        model: The network of the run folders, where it is not one of tnreg's own: import path or mine.py:Net.
        output: Where the logits are in what a network gives: a key, an attribute, or a number in a tuple; if
            left out, what it gives if that is a tensor, else its "logits".
        trust: Open .pt2 files, whose reader in torch runs code that a file brings along.
        distances: Pixels between the patches; nine up to the largest if left out.
        size: Side of the patches in pixels; an eighth of the image's shorter side if left out.
        samples: Images whose patches are crossed.
        pairs: Pairs of patches for each distance.
        anywhere: Patches anywhere, not only where images differ.
        map: Cut the images into rows and columns of regions, e.g. 4x8, and measure all pairs of them too.
        seed: Draws patches and images; the same for all models.
        figure: Draw all models, and their maps, into this file.
        json: Print one JSON document instead of the tables.
    """
    if not models or (weights is not None and len(models) > 1):
        raise OptionError("probe: name one model or more; with --weights exactly one.")
    grid = _grid(map)
    reply = Reply(json, figure=figure)
    with reply.working("reading images ..."), blame("data"):
        images = images_of(data)
    profiles: list[LocalityProfile] = []
    maps: list[InteractionMap] = []
    common: dict[str, Any] = {"samples": samples, "seed": seed, "output": logits_at(output)}
    common["progress"] = reply.shows()
    for name in models:
        try:
            with reply.undisturbed():
                with reply.working(f"reading {name} ..."):
                    net = network_of(name, images.shape[1], weights=weights, model=model, trust=trust)
                profiles.append(tnreg.locality_profile(
                    net, images, distances=distances or None, size=size, pairs=pairs,
                    where="anywhere" if anywhere else "differing", **common,
                ))  # fmt: skip
                maps += [tnreg.interaction_map(net, images, grid, **common)] if grid else []
        except (RuntimeError, AssertionError) as error:
            raise OptionError(
                f"{name} does not take images of shape {tuple(images.shape[1:])}.\n"
                f"  {str(error).splitlines()[0]}"
            ) from None
    named, mapped = list(zip(models, profiles, strict=True)), list(zip(models, maps, strict=False))
    others = [profiles[0].compare(profile, (models[0], name)) for name, profile in named[1:]]
    reply.text("\n".join([*(f"{name}: {p.summary}" for name, p in named), *(c.summary for c in others), ""]))
    for name, profile in named:
        reply.text(f"{name}, patches of {profile.size}x{profile.size} pixels\n{profile}")
    for text in (*others, *(f"{name}, {found}" for name, found in mapped)):
        reply.text(f"\n{text}")

    def draw(axes: Any) -> None:
        first, *rest = axes if maps else [axes]
        plots.locality_profile(dict(named), first)
        for (name, found), ax in zip(mapped, rest, strict=True):
            plots.interaction_map(found, ax).set_title(plain_label(name), fontsize=9)

    reply.picture(draw, 1 + len(maps))
    documents = [_means(*item) for item in named]
    for document, found in zip(documents, maps, strict=False):
        document["map"] = {"summary": found.summary, **vars(found)}
    comparisons = [_difference(found) for found in others]
    reply.document({"data": data, "models": documents, "comparisons": comparisons})


def _grid(text: str | None) -> tuple[int, int] | None:
    """Return rows and columns of a grid such as ``4x8``."""
    found = re.fullmatch(r"(\d+)x(\d+)", text or "4x8")
    if found is None:
        message = f"--map: a grid is ROWSxCOLUMNS, e.g. 4x8, found {text!r}."
        raise OptionError(message, argument="map")
    return (int(found[1]), int(found[2])) if text else None


def _means(name: str, profile: LocalityProfile) -> dict[str, Any]:
    rows = _rows(profile, interaction=profile.interaction, **{"effective rank": profile.effective_rank})
    return {"model": name, "summary": profile.summary, "size": profile.size, "distances": rows}


def _difference(found: ProfileComparison) -> dict[str, Any]:
    first, second = found.names
    rows = _rows(found, difference=found.difference)
    rows = [{**row, "differs": differs} for row, differs in zip(rows, found.differs, strict=True)]
    return {"model": second, "against": first, "summary": found.summary, "distances": rows}


def _rows(found: LocalityProfile | ProfileComparison, **columns: Any) -> list[dict[str, Any]]:
    means = {name: values.mean(1) for name, values in columns.items()}
    means = {"distance": found.distances, **means, "standard error": found.standard_error}
    return [dict(zip(means, row, strict=True)) for row in zip(*means.values(), strict=True)]
