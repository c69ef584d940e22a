import pytest
import torch

from revnet.errors import CheckpointError
from revnet.training import LanguageConfig, load_language_model, train

SETTINGS = {"length": 16, "depth": 1, "dim": 16, "num_heads": 2, "batch_size": 4, "val_windows": 4, "max_updates": 1}


def run(tmp_path, name, text, **settings):
    path = tmp_path / f"{name}.txt"
    path.write_text(text)
    config = LanguageConfig(data=str(path), **SETTINGS | settings, out_dir=str(tmp_path / name))
    return train(config).folder


def test_shared_characters_keep_their_rows(tmp_path, capsys):
    first = run(tmp_path, "first", "abcd " * 60)
    capsys.readouterr()
    second = run(tmp_path, "second", "bdxy " * 60, weights=str(first), lr=1e-12, weight_decay=0.0)
    assert f"{first / 'last.safetensors'}, except the rows of 'xy', which is new characters" in capsys.readouterr().out
    old, new = load_language_model(first), load_language_model(second)
    for character in "bd ":
        before = old.model.embedding.weight[old.vocabulary.characters.index(character)]
        after = new.model.embedding.weight[new.vocabulary.characters.index(character)]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    blocks = [dict(model.model.blocks.named_parameters()) for model in (old, new)]
    for name, parameter in blocks[0].items():
        torch.testing.assert_close(blocks[1][name], parameter, rtol=1e-6, atol=1e-6)


def test_rejects_weights_of_other_settings(tmp_path):
    first = run(tmp_path, "first", "abcd " * 60)
    with pytest.raises(CheckpointError, match=r"do not fit the model: the model has no|in the file and"):
        run(tmp_path, "second", "abcd " * 60, weights=str(first), dim=32)
