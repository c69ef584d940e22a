import pytest

from revnet.data.sources.text import CHARACTERS
from revnet.data.tokens.byte_pairs import LEAST_TOKENS
from revnet.training import LanguageConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"length": 0}, ValueError, r"`length` \(=0\) must be 1 or more"),
        ({"dim": 18, "num_heads": 2}, ValueError, r"`dim` \(=18\) must be a multiple of twice `num_heads` .*; pass 20"),
        ({"attention": "sparse"}, ValueError, r"`attention` \(='sparse'\) must be `full` or `lsh` or `hierarchical`"),
        ({"block_size": 3}, ValueError, r"`block_size` \(=3\) must be even; pass 4"),
        ({"val_fraction": 0}, ValueError, r"`val_fraction` \(=0\) must be a finite number above 0 and below 1"),
        ({"dropout": 1.0}, ValueError, r"`dropout` \(=1.0\) must be a finite number from 0 to below 1"),
        ({"val_windows": 0}, ValueError, r"`val_windows` \(=0\) must be 1 or more"),
        ({"data": ""}, ValueError, r"`data` \(=''\) must not be empty"),
    ],
)
def test_rejects_invalid_settings(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        LanguageConfig(**settings)
    assert "\n" not in str(caught.value)


def test_names_and_numbers_of_tokens_are_the_ones_of_the_data():
    """The settings repeat them, because importing the data would load PyTorch."""
    assert LanguageConfig().tokenizer == CHARACTERS
    assert LanguageConfig(tokenizer="bpe", vocab_size=LEAST_TOKENS).vocab_size == LEAST_TOKENS
    with pytest.raises(ValueError, match="vocab_size"):
        LanguageConfig(tokenizer="bpe", vocab_size=LEAST_TOKENS - 1)
    with pytest.raises(ValueError, match="vocab_size"):
        LanguageConfig(tokenizer=CHARACTERS, vocab_size=LEAST_TOKENS)
