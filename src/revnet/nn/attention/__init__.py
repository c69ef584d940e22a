"""Attention layers. They differ in the tokens that a token sees, and in the cost for long sequences.

Call all of them as `attention(x, mask=mask, rotary=rotary)`, and `CrossAttention` with another sequence as well. The
names are provisional: they may change in any release.
"""

from revnet.nn.attention.cross import CrossAttention as CrossAttention
from revnet.nn.attention.full import FullAttention as FullAttention
from revnet.nn.attention.hierarchical import HierarchicalAttention as HierarchicalAttention
from revnet.nn.attention.key_values import KeyValueCache as KeyValueCache
from revnet.nn.attention.lsh import LSHAttention as LSHAttention
