"""To and from the formats of other libraries: tensorly, tensornetwork, quimb, arrays.

Which format a factorization has is read off its tree and joins: a star of diagonal joins is CP, a star
of full joins Tucker, a caterpillar of full joins a tensor train (matrix product state). Networks of
``tensornetwork`` nodes (made by ``tnreg.network``) and of quimb may be any tree. Every conversion is
exact; weights are copied, except for ``to_quimb``.

Arrays may be torch's, numpy's, anything with ``__array__`` or ``__dlpack__``, or nested lists. What comes
out are torch tensors: ``numpy.asarray`` and any ``from_dlpack`` take them, detached, without a copy.
"""

from tnreg.convert.formats import (
    from_cp,
    from_tensor_train,
    from_tensorly,
    from_tucker,
    to_cp,
    to_tensor_train,
    to_tensorly,
    to_tucker,
)
from tnreg.convert.nodes import from_nodes
from tnreg.convert.quimb import from_quimb, to_quimb

__all__ = [
    "from_cp",
    "from_nodes",
    "from_quimb",
    "from_tensor_train",
    "from_tensorly",
    "from_tucker",
    "to_cp",
    "to_quimb",
    "to_tensor_train",
    "to_tensorly",
    "to_tucker",
]
