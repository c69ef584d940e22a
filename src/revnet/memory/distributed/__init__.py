"""Memory and communication of a training step on several devices."""
