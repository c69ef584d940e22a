"""Files for inference: the model of a run in a format that programs without revnet can run."""
