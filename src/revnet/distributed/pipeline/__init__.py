"""An exact reversible pipeline: a stage keeps no activations of a microbatch, because its output comes back."""
