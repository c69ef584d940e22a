"""Make a residual network reversible in place: `revnet.convert(model.blocks, method)`.

The blocks of any model keep their names, parameters and classes, and the code that calls them stays. A method says how
the converted network relates to the original one.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.conversion._convert import convert as convert
from revnet.conversion._convert import set_method as set_method
from revnet.conversion._methods import BDIA as BDIA
from revnet.conversion._methods import AbstractMethod as AbstractMethod
from revnet.conversion._methods import Adapter as Adapter
from revnet.conversion._methods import Consistent as Consistent
from revnet.conversion._methods import Dr2Net as Dr2Net
from revnet.conversion._methods import Rewire as Rewire
from revnet.conversion._report import ConversionReport as ConversionReport
from revnet.conversion._schedule import ConversionSchedule as ConversionSchedule
