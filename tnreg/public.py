"""The public names of tnreg, which ``import tnreg`` loads when one of them is first used."""

from tnreg.errors import DataError, FileError, OptionError, ShapeError, SizeError, TnregError, TreeError
from tnreg.trees.tree import ModeTree, gallery, load_tree
from tnreg.training.trajectory import Trajectory
from tnreg.training.optim import GroupRMSprop
from tnreg.networks.network import Network
from tnreg.convert.nodes import network
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.tensors.arrays import matricize
from tnreg.networks.plan import Plan, plan
from tnreg.factorizations.factorization import Factorization, load
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.ranks.decompose import decompose, truncate
from tnreg.factorizations.components import balance_
from tnreg.tensors.loading import load_tensor, open_tensor
from tnreg.training.tasks import completion, sensing
from tnreg.training.fit import fit
from tnreg.search.cross import cross
from tnreg.search.find import find_tree
from tnreg.search.interchange import interchange
from tnreg.search.samples import data_entanglement, rearrange
from tnreg.recovery.complete import complete
from tnreg.cnns.convnet import from_cnn, to_cnn
from tnreg.cnns.convnet import ConvNet
from tnreg.cnns.classifier import ConvAC, Representation
from tnreg.cnns.export import export_onnx, export_pt2, export_state
from tnreg.cnns.penalties import EffectiveRankPenalty, LocalComponentPenalty
from tnreg.far.patches import DifferingPatches, PresetPatches, RandomPatches
from tnreg.far.interaction import InteractionEnergy, InteractionRank
from tnreg.far.regularizers import InputGradientChange
from tnreg.far.grids import grid_tensor
from tnreg.far.probe import LocalityProfile, ProfileComparison, locality_profile, separation_spectrum
from tnreg.far.interaction_map import InteractionMap, interaction_map
from tnreg import algebra, convert, dynamics, images, plots

__all__ = [
    # trees and networks
    "ModeTree", "gallery", "load_tree", "find_tree", "Network", "network", "Plan", "plan",
    # factorizations
    "Factorization", "load", "balance_", "decompose", "truncate", "interchange", "cross",
    "algebra", "convert",
    # ranks
    "matricize", "spectra", "hierarchical_rank", "effective_rank", "entanglement_entropy",
    # what data suits a tree
    "data_entanglement", "rearrange",
    # training
    "load_tensor", "open_tensor", "completion", "sensing", "fit", "GroupRMSprop", "Trajectory",
    # completion
    "complete",
    # convolutional networks
    "ConvNet", "to_cnn", "from_cnn", "ConvAC", "Representation", "export_onnx", "export_pt2", "export_state",
    "LocalComponentPenalty", "EffectiveRankPenalty", "grid_tensor",
    # seeing far
    "InputGradientChange", "InteractionEnergy", "InteractionRank",
    "RandomPatches", "PresetPatches", "DifferingPatches",
    "separation_spectrum", "locality_profile", "LocalityProfile", "ProfileComparison",
    "interaction_map", "InteractionMap", "images",
    # theory, pictures and errors
    "dynamics", "plots",
    "TnregError", "TreeError", "ShapeError", "SizeError", "DataError", "OptionError", "FileError",
]  # fmt: skip
