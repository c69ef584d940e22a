"""Modules that hold residual functions and run them reversibly."""

from revnet.nn._batch_norm import BatchNorm2dBiased as BatchNorm2dBiased
from revnet.nn._block import ReversibleBlock as ReversibleBlock
from revnet.nn._conv import Conv2dSame as Conv2dSame
from revnet.nn._policy import AbstractPolicy as AbstractPolicy
from revnet.nn._policy import Reverse as Reverse
from revnet.nn._policy import Store as Store
from revnet.nn._sequential import ReversibleSequential as ReversibleSequential
