"""Reproductions of the paper's figures and tables.

The names below load PyTorch and Lightning on first use, so that the command line can check its flags and print its help
without them.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__, purpose="a figure")
