"""The paper's figure of gradient angles: gradients of rebuilt activations against gradients of stored ones."""
