"""tnreg: tensor factorizations as tensor networks over mode trees.

Every edge of a mode tree is an index, every node a weight. CP, Tucker, tensor train, hierarchical
Tucker, hierarchical tensor factorization and deep matrix factorization are trees, not classes.
"""

from tnreg.errors import (
    DataError,
    FileError,
    OptionError,
    ShapeError,
    SizeError,
    TnregError,
    TreeError,
)
from tnreg.tree import ModeTree, gallery, load_tree
from tnreg.trajectory import Trajectory
from tnreg.optim import GroupRMSprop
from tnreg.network import Network, network
from tnreg.rank import effective_rank, entanglement_entropy, matricize
from tnreg.contraction import Plan, plan
from tnreg.factorization import Factorization, load
from tnreg.gramians import hierarchical_rank, spectra
from tnreg.hsvd import decompose, truncate
from tnreg.components import balance_
from tnreg.tensors import load_tensor, open_tensor
from tnreg.tasks import completion, sensing
from tnreg.fit import fit
from tnreg.cnn import from_cnn, to_cnn
from tnreg.convnet import ConvNet
from tnreg.convac import ConvAC, Representation
from tnreg.export import export_onnx, export_pt2, export_state
from tnreg.penalties import EffectiveRankPenalty, LocalComponentPenalty
from tnreg.patches import DifferingPatches, PresetPatches, RandomPatches
from tnreg.regularizers import InputGradientChange, InteractionEnergy
from tnreg.grids import grid_tensor
from tnreg.probe import LocalityProfile, locality_profile, separation_spectrum
from tnreg import algebra, convert, dynamics, images, plots

__all__ = [
    # trees and networks
    "ModeTree", "gallery", "load_tree", "Network", "network", "Plan", "plan",
    # factorizations
    "Factorization", "load", "balance_", "decompose", "truncate",
    "algebra", "convert",
    # ranks
    "matricize", "spectra", "hierarchical_rank", "effective_rank", "entanglement_entropy",
    # training
    "load_tensor", "open_tensor", "completion", "sensing", "fit", "GroupRMSprop", "Trajectory",
    # convolutional networks
    "ConvNet", "to_cnn", "from_cnn", "ConvAC", "Representation", "export_onnx", "export_pt2", "export_state",
    "LocalComponentPenalty", "EffectiveRankPenalty", "grid_tensor",
    # seeing far
    "InputGradientChange", "InteractionEnergy", "RandomPatches", "PresetPatches", "DifferingPatches",
    "separation_spectrum", "locality_profile", "LocalityProfile", "images",
    # theory, pictures and errors
    "dynamics", "plots",
    "TnregError", "TreeError", "ShapeError", "SizeError", "DataError", "OptionError", "FileError",
]  # fmt: skip

__version__ = "0.1.0"
