"""Reversible residual networks for PyTorch: activation memory that does not grow with depth.

The names in `revnet.__all__` are the stable API. They keep their meaning and signature between minor releases. The
modules, such as `revnet.nn` and `revnet.memory`, export more names. These are provisional: they may change in any
release, and the changelog says so.

Names load PyTorch when they are first used, not when `revnet` is imported, so that `revnet --help` answers quickly.

`from revnet import *` imports only the stable API. It does not import the modules, since `revnet.nn` would replace the
`nn` of `from torch import nn`.
"""

from revnet._lazy import attach

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
