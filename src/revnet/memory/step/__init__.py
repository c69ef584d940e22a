"""Memory of one training step: measured, or predicted from shapes."""
