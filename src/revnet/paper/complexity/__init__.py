"""The paper's table of complexities, measured: memory, arithmetic and time of one step against depth."""
