# The names of the package, each of them once: type checkers and `revnet._lazy` read this file.
from revnet.paper.complexity.page import run_complexity as run_complexity
from revnet.paper.gradient_angle.callbacks import GradientAngle as GradientAngle
from revnet.paper.gradient_angle.gradients import gradient_errors as gradient_errors
from revnet.paper.gradient_angle.page import run_gradient_angle as run_gradient_angle
from revnet.paper.reproduction import reproduce as reproduce
from revnet.paper.tables import TABLES as TABLES
