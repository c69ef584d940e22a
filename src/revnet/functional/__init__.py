"""Functions on tensors: attention kernels, rotary embeddings, and modules and losses that run on parts of their input.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.functional._chunked import chunked as chunked
from revnet.functional._full_attention import full_attention as full_attention
from revnet.functional._hierarchical_attention import hierarchical_attention as hierarchical_attention
from revnet.functional._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from revnet.functional._lsh_attention import lsh_attention as lsh_attention
from revnet.functional._rotary import rotary_table as rotary_table
from revnet.functional._rotary import rotate as rotate
from revnet.functional._sliding_window import sliding_window_inference as sliding_window_inference
