"""The engine: runs chains of half-blocks, and rebuilds in the backward pass what they did not keep."""
