"""The run, as the three families share it: from start to end, with the files in its folder."""
