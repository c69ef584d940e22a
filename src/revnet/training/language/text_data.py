"""The text of a run: its tokens, what the model must know of them, and their bytes."""

from dataclasses import replace

from revnet._paths import absolute_path
from revnet.data import BytePairVocabulary, ConsecutiveWindows, Vocabulary, load_text
from revnet.data.sources.text import BPE, CHARACTERS, TextDataset
from revnet.data.tokens.abstract_vocabulary import AbstractVocabulary
from revnet.training.language.config import LanguageConfig
from revnet.training.language.model import DEFAULTS, JOINED, SEPARATE, LanguageHeader, differing_options


def load_data(config: LanguageConfig) -> tuple[TextDataset, LanguageConfig]:
    """Return the text in tokens, and the settings with the path and the size of its tokenizer."""
    path = config.data
    assert path is not None
    if config.tokenizer not in (CHARACTERS, BPE):
        config = replace(config, tokenizer=absolute_path(config.tokenizer))
    dataset = load_text(
        path, val_fraction=config.val_fraction, tokenizer=config.tokenizer, vocab_size=config.vocab_size
    )
    if config.tokenizer == BPE:
        config = replace(config, vocab_size=len(dataset.vocabulary))
    if dataset.num_documents is None:
        if config.cross_documents:
            raise ValueError(
                f"`cross_documents` (=True) does not go with `data` (='{config.data}'), which is one text; leave it "
                "out, or pass a folder of .txt files, or a .jsonl file."
            )
    elif config.attention != "full" and not config.cross_documents:
        raise ValueError(
            f"`attention` (={config.attention!r}) cannot keep documents apart; pass `cross_documents`, which lets "
            "tokens see earlier documents, or full attention."
        )
    return dataset, config


def make_header(config: LanguageConfig, dataset: TextDataset) -> LanguageHeader:
    """Return the header of a model for `dataset`."""
    vocabulary, documents = dataset.vocabulary, None
    if dataset.num_documents is not None:
        documents = JOINED if config.cross_documents else SEPARATE
    return LanguageHeader(
        data=str(config.data),
        characters=vocabulary.characters if isinstance(vocabulary, Vocabulary) else "",
        tokenizer=vocabulary.file.to_json() if isinstance(vocabulary, BytePairVocabulary) else None,
        documents=documents,
        options={
            "dim": config.dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "max_length": config.length,
            "attention": config.attention,
            **_attention_options(config),
            "ff_mult": config.ff_mult,
            "ff_chunks": config.ff_chunks,
            "dropout": config.dropout,
            **differing_options({name: getattr(config, name) for name in DEFAULTS if hasattr(config, name)}),
        },
    )


def count_bytes(windows: ConsecutiveWindows, vocabulary: AbstractVocabulary) -> int:
    """Return the number of bytes of the tokens that the windows predict."""
    sizes = vocabulary.token_bytes()
    return sum(int(sizes[batch[:, 1:]].sum()) for batch in windows)


def average_bytes(config: LanguageConfig, dataset: TextDataset) -> float:
    """Return the average number of bytes of a token that a validation predicts."""
    windows = ConsecutiveWindows(
        dataset.validation, length=config.length, batch_size=config.batch_size, max_windows=config.val_windows
    )
    return count_bytes(windows, dataset.vocabulary) / (windows.num_windows * config.length)


def _attention_options(config: LanguageConfig) -> dict[str, int]:
    match config.attention:
        case "lsh":
            return {"bucket_size": config.bucket_size, "num_hashes": config.num_hashes}
        case "hierarchical":
            return {"block_size": config.block_size}
    return {}
