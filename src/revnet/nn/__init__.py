"""Modules that hold residual functions and run them reversibly."""

from revnet.nn._abstract_block import AbstractReversibleBlock as AbstractReversibleBlock
from revnet.nn._batch_norm import BatchNorm2dBiased as BatchNorm2dBiased
from revnet.nn._block import ReversibleBlock as ReversibleBlock
from revnet.nn._conv import Conv2dSame as Conv2dSame
from revnet.nn._coupling_layer import CouplingLayer as CouplingLayer
from revnet.nn._momentum_block import MomentumBlock as MomentumBlock
from revnet.nn._policy import AbstractModulePolicy as AbstractModulePolicy
from revnet.nn._policy import AbstractPolicy as AbstractPolicy
from revnet.nn._policy import Checkpoint as Checkpoint
from revnet.nn._policy import Offload as Offload
from revnet.nn._policy import Reverse as Reverse
from revnet.nn._policy import Store as Store
from revnet.nn._policy_holder import AbstractPolicyHolder as AbstractPolicyHolder
from revnet.nn._policy_holder import PolicyUnit as PolicyUnit
from revnet.nn._policy_holder import one_for_each as one_for_each
from revnet.nn._policy_holder import policy_holders as policy_holders
from revnet.nn._policy_holder import restoring_policies as restoring_policies
from revnet.nn._policy_holder import set_policy as set_policy
from revnet.nn._policy_sequential import PolicySequential as PolicySequential
from revnet.nn._restoring_state import restoring_state as restoring_state
from revnet.nn._sequential import ReversibleSequential as ReversibleSequential
