"""What the three families share: one run from start to end, and the files in its folder."""
