"""How sparse weights are held: sparse layers, compact files, and models made to run on them."""

from sparsetrain.storage.compress import compress
from sparsetrain.storage.csr.kernels import using
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLinear
from sparsetrain.storage.file_sizes import Sizes, sizes
from sparsetrain.storage.files import load, load_into, save
from sparsetrain.storage.semi_structured import semi_structured

__all__ = [
    "Sizes",
    "SparseConv2d",
    "SparseLinear",
    "compress",
    "load",
    "load_into",
    "save",
    "semi_structured",
    "sizes",
    "using",
]
