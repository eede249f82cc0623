"""Gradients that are computed inside a function, wherever it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tnreg.errors import DataError


@contextmanager
def differentiating() -> Iterator[None]:
    """Enable gradients, under ``torch.no_grad`` and ``torch.inference_mode`` as well.

    Tensors that were made under ``torch.inference_mode`` have none: where they meet others this raises a
    ``DataError``.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        message = "a network, a model or data made under torch.inference_mode has no gradients, and they are "
        raise DataError(f"{message}needed here; make it outside, e.g. under torch.no_grad().") from None
