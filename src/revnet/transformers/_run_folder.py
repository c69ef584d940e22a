"""Exchange language models with `revnet train lm`."""

from pathlib import Path

from revnet.models import ReversibleTransformer
from revnet.training import LanguageModel, load_language_model
from revnet.training.language.model import LanguageHeader
from revnet.training.run.checkpoint import save_weights
from revnet.transformers._causal_lm_config import ReversibleTransformerConfig
from revnet.transformers._tied_head import TiedHead


def read_run(path: str | Path) -> LanguageModel:
    """Load the language model of a run."""
    return load_language_model(path)


def write_weights(model: ReversibleTransformer, config: ReversibleTransformerConfig, path: Path) -> None:
    """Write the weights file of a language model of characters."""
    characters = config.characters
    if characters is None or len(characters) != config.vocab_size:
        given = "None" if characters is None else f"{len(characters)} characters"
        raise ValueError(
            f"`config.characters` (={given}) must have one character for each of the {config.vocab_size} tokens; save "
            "models of other tokens with `save_pretrained`."
        )
    if isinstance(model.head, TiedHead):
        raise ValueError(
            "`config.tie_word_embeddings` (=True) has no counterpart in `revnet train lm`; save the model with "
            "`save_pretrained`."
        )
    options = {
        "dim": config.dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "max_length": config.max_position_embeddings,
        "attention": config.attention,
        "bucket_size": config.bucket_size,
        "num_hashes": config.num_hashes,
        "block_size": config.block_size,
        "ff_mult": config.ff_mult,
        "ff_chunks": config.ff_chunks,
        "dropout": config.dropout,
    }
    header = LanguageHeader(data=config.name_or_path or "transformers", characters=characters, options=options)
    save_weights(LanguageModel(model, header), path)
