import pytest

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
