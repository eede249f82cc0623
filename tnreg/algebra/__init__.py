"""Arithmetic of factorizations along one tree; results are factorizations, nothing is made dense.

Sums add bonds, entrywise products multiply them; ``truncate`` brings them down again. Every function
leaves its arguments alone. A result is a new model with weights of its own, which autograd does not
connect to theirs.
"""

from tnreg.algebra.arithmetic import add, hadamard, linear_combination, scale, subtract
from tnreg.algebra.joins import bare_leaves, diagonal_joins, full_joins, reroot
from tnreg.algebra.modes import contract_modes, marginal, mode_product, permute_modes, select

__all__ = [
    "add",
    "bare_leaves",
    "contract_modes",
    "diagonal_joins",
    "full_joins",
    "hadamard",
    "linear_combination",
    "marginal",
    "mode_product",
    "permute_modes",
    "reroot",
    "scale",
    "select",
    "subtract",
]
