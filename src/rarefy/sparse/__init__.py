"""Which weights live while a network trains: one method a file, all under the contract of :class:`Sparsifier`."""

from rarefy.sparse.acceleration import Acceleration, Choice, accelerate
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.families.latent import Latent, Projected
from rarefy.sparse.families.learned import Learned
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.families.soft_threshold import SoftThreshold
from rarefy.sparse.methods.acdc import ACDC
from rarefy.sparse.methods.autosparse import AutoSparse
from rarefy.sparse.methods.band import Band
from rarefy.sparse.methods.cs import ContinuousSparsification
from rarefy.sparse.methods.dst import DST
from rarefy.sparse.methods.feather import Feather
from rarefy.sparse.methods.gmp import GMP
from rarefy.sparse.methods.granet import GraNet
from rarefy.sparse.methods.ltp import LTP
from rarefy.sparse.methods.mest import MEST
from rarefy.sparse.methods.nm import NM
from rarefy.sparse.methods.optg import OptG
from rarefy.sparse.methods.powerprop import PowerPropagation
from rarefy.sparse.methods.rigl import RigL
from rarefy.sparse.methods.set import SET
from rarefy.sparse.methods.snfs import SNFS
from rarefy.sparse.methods.st3 import ST3
from rarefy.sparse.methods.static import Static
from rarefy.sparse.methods.str import STR
from rarefy.sparse.methods.topk import TopK
from rarefy.sparse.methods.topkast import TopKAST
from rarefy.sparse.registry import create, list_methods, names, options, register
from rarefy.sparse.reports import Info, LayerState

__all__ = [
    "ACDC",
    "DST",
    "GMP",
    "LTP",
    "MEST",
    "NM",
    "SET",
    "SNFS",
    "ST3",
    "STR",
    "Acceleration",
    "AutoSparse",
    "Band",
    "Choice",
    "ContinuousSparsification",
    "Feather",
    "GraNet",
    "Info",
    "Latent",
    "LayerState",
    "Learned",
    "Masked",
    "OptG",
    "PowerPropagation",
    "Projected",
    "RigL",
    "SoftThreshold",
    "Sparsifier",
    "Static",
    "TopK",
    "TopKAST",
    "accelerate",
    "create",
    "list_methods",
    "names",
    "options",
    "register",
]
