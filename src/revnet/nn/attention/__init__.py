"""Attentions, one a file: what a token takes from other tokens, at what cost in the length.

All are called as `attention(x, mask=mask, rotary=rotary)`.
"""

from revnet.nn.attention.full import FullAttention as FullAttention
from revnet.nn.attention.hierarchical import HierarchicalAttention as HierarchicalAttention
from revnet.nn.attention.lsh import LSHAttention as LSHAttention
