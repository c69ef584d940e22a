import pytest
import torch

from revnet.data import ConsecutiveWindows, RandomWindows, Vocabulary, load_text
from revnet.errors import DataError

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🎉\n" * 3


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_text_is_cut_into_a_beginning_and_an_end(file):
    dataset = load_text(file, val_fraction=0.25)
    assert dataset.name == "a text"
    assert len(dataset.validation) == len(TEXT) - len(dataset.train) == round(0.25 * len(TEXT))
    assert dataset.vocabulary == Vocabulary.of(TEXT)
    decode = dataset.vocabulary.decode
    assert decode(dataset.train) + decode(dataset.validation) == TEXT


def test_encoding_and_decoding_are_inverse():
    vocabulary = Vocabulary.of(TEXT)
    tokens = vocabulary.encode("Deich 🎉")
    assert tokens.dtype == torch.int64
    assert vocabulary.decode(tokens) == "Deich 🎉"
    assert list(vocabulary.characters) == sorted(set(TEXT))


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"`prompt` has the character 'x', which is not among the 2 .*: 'ab'"):
        Vocabulary.of("ab").encode("bax", "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; pass a text file with something in it"),
        (b"\x89PNG\r\n\xff", r"is not text in UTF-8, at byte 0; pass a text file, or convert it"),
        (b"ab\x00cd", r"holds bytes of zero, so it is no text"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; pass a text file"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="is a folder; pass a text file"):
        load_text(tmp_path)


def random_windows(**options):
    return RandomWindows(torch.arange(50), **({"length": 4, "batch_size": 3, "num_batches": 5, "seed": 7} | options))


def test_windows_are_a_function_of_seed_and_update_alone():
    straight = random_windows()
    epochs = []
    for epoch in range(2):
        straight.set_epoch(epoch)
        epochs += list(straight)
    torch.rand(100)
    resumed = random_windows()
    resumed.sampler.set_epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(epochs[5:], resumed, strict=True))
    assert not torch.equal(epochs[0], epochs[5])
    assert not torch.equal(epochs[0], random_windows(seed=8).batch(0))


def test_nothing_is_drawn_from_the_global_state():
    state = torch.get_rng_state()
    list(random_windows())
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_are_pieces_of_the_text_from_its_first_to_its_last_place():
    windows = torch.cat(list(random_windows(batch_size=200)))
    assert windows.shape == (1000, 5)
    assert windows.dtype == torch.int64
    assert (windows.diff() == 1).all()
    assert (windows.min(), windows.max()) == (0, 49)


def test_consecutive_windows_guess_every_token_once():
    windows = torch.cat(list(ConsecutiveWindows(torch.arange(22), length=5, batch_size=3)))
    assert windows[:, 0].tolist() == [0, 5, 10, 15]
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))


def test_of_many_windows_some_are_taken_evenly():
    windows = ConsecutiveWindows(torch.arange(101), length=10, batch_size=2, max_windows=4)
    assert (len(windows), windows.num_windows) == (2, 4)
    assert torch.cat(list(windows))[:, 0].tolist() == [0, 20, 50, 70]


@pytest.mark.parametrize("make", [random_windows, lambda **options: ConsecutiveWindows(torch.arange(50), **options)])
def test_a_text_without_a_window_is_refused(make):
    with pytest.raises(ValueError, match=r"`length` \(=50\) must be less than the 50 characters"):
        make(length=50, batch_size=1)
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\) must be positive"):
        make(length=5, batch_size=0)
