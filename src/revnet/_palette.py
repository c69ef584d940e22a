"""Colors of the figures.

The bright colors are Paul Tol's qualitative scheme, which readers with any color vision can tell apart.
"""

BLUE, CYAN, GREEN, YELLOW, RED, PURPLE = "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"
GRAY, LIGHT_GRAY, INK = "#888888", "#bbbbbb", "#333333"
REVERSIBLE, REVERSIBLE_LIGHT, STORED = "#0055aa", "#5599dd", "#ee7733"
"""This library, a variant of it, and what it is compared with."""
CHECKPOINT_SQRT, CHECKPOINT_RECURSIVE = "#cc9900", "#997755"
