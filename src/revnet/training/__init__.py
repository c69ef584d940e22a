"""Training with Lightning: settings, runs, and the files that a run writes.

PyTorch and Lightning load when a name that needs them is first used. The command line can check its flags and print its
help without them.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__, purpose="training")
