"""The settings of a run: fields with rules, in groups that the three families share."""
