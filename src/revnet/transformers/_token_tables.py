"""The two tables of a language model with a row for each token, as transformers reads and replaces them."""

import torch
from torch import nn

from revnet.models import ReversibleTransformer
from revnet.nn import CrossEntropyHead


class TokenTables:
    """The part of `ReversibleTransformerForCausalLM` that holds the embedding and the head."""

    transformer: ReversibleTransformer
    """The network."""
    training: bool
    """Whether the model is in training mode."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.transformer.embedding = value
        self.transformer.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.transformer.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        if not isinstance(new_embeddings, CrossEntropyHead):
            with torch.device("meta"):
                head = type(self.transformer.head)(
                    new_embeddings.in_features,
                    new_embeddings.out_features,
                    bias=new_embeddings.bias is not None,
                    is_chunked=self.transformer.head.is_chunked,
                )
            head.weight, head.bias = new_embeddings.weight, new_embeddings.bias
            new_embeddings = head.train(self.training)
        self.transformer.head = new_embeddings
