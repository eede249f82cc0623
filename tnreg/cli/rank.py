"""The command ``rank``, which looks at a tensor."""

import torch

from tnreg import effective_rank, entanglement_entropy, plots, spectra
from tnreg.cli.inputs import DEFAULTS, InputOptions, read_input
from tnreg.cli.output import Picture, Reply, table_of
from tnreg.ranks.dense import numerical_rank


def rank(
    file: str,
    /,
    *,
    reading: InputOptions = DEFAULTS,
    rtol: float = 1e-3,
    figure: Picture = None,
    json: bool = False,
) -> None:
    """Print the hierarchical ranks, effective ranks and entropies of a tensor along a tree.

    Args:
        file: A .npy, .npz, .safetensors, .pt, .mat, .nc, .csv or .parquet file, a model that `tnreg fit`
            saved, or kinetic, il2, covid19, indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read
            block by block.
        reading: How the file is read.
        rtol: A singular value counts if it is above rtol times the largest of its node.
        figure: Draw the singular values into this file.
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json, figure=figure)
    with torch.no_grad(), reply.working("singular values ..."):
        tensor = read_input(file, reading)
        values = spectra(tensor.x, tensor.tree, memory=reading.memory)
        rows = [
            {"node": str(node), "singular values": len(s), "rank": numerical_rank(s, rtol),
             "effective rank": float(effective_rank(s)), "entropy": float(entanglement_entropy(s)),
             "largest": float(s[0])}
            for node, s in values.items()
        ]  # fmt: skip
    columns = {
        "node": "{node}", "singular values": "{singular values}", f"rank (rtol {rtol:g})": "{rank}",
        "effective rank": "{effective rank:.2f}", "entropy": "{entropy:.3f}", "largest": "{largest:.4g}",
    }  # fmt: skip
    title = f"{tensor.name} {tensor.sizes}"
    named = {tensor.labels.get(node, node): s for node, s in values.items()}
    cells = [{**row, "node": str(node)} for row, node in zip(rows, named, strict=True)]
    reply.table(table_of(cells, columns, title=title, title_justify="center"))
    reply.picture(lambda axes: plots.spectra(named, axes))
    reply.document({"tensor": tensor.name, "sizes": tensor.sizes, "rtol": rtol, "nodes": rows})
