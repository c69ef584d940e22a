"""Several processes that run the same command: how they start, meet, fail together and divide the work."""
