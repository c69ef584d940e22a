"""Exchange language models with `revnet train lm`."""

from pathlib import Path

from revnet.models import ReversibleTransformer
from revnet.training import LanguageModel, load_language_model
from revnet.training.language.model import DEFAULTS, LanguageHeader, differing_options
from revnet.training.run.checkpoint import save_weights
from revnet.transformers._causal_lm_config import ReversibleTransformerConfig


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
    options: dict[str, object] = {
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
    chosen = {name: getattr(config, name) for name in DEFAULTS if name not in ("tie_embeddings", "exact")}
    chosen |= {"tie_embeddings": config.tie_word_embeddings, "exact": config.coupling == "fixed_point"}
    options |= differing_options(chosen)
    header = LanguageHeader(data=config.name_or_path or "transformers", characters=characters, options=options)
    save_weights(LanguageModel(model, header), path)
