"""Optimizer steps that save memory.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.optim._step_in_backward import StepInBackward as StepInBackward
