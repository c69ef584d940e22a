"""What results may replace."""

import pytest
import torch
from PIL import Image

from revnet._figure import new_figure, save
from revnet._result_files import begins_with, is_picture, make_results_folder, may_replace
from revnet.training.density.image_grid import save_grid


@pytest.mark.parametrize(
    "write",
    [lambda path: save(new_figure(1, 1), path), lambda path: save_grid(torch.zeros(1, 3, 2, 2), path, title="a title")],
    ids=["figure", "grid"],
)
def test_a_picture_replaces_pictures_of_revnet_only(tmp_path, write):
    picture, other = tmp_path / "picture.png", tmp_path / "other.png"
    assert may_replace(picture, is_picture)
    write(picture)
    assert may_replace(picture, is_picture)
    Image.open(picture).save(other)  # as an editor does, without the metadata
    for path in (other, tmp_path / "text.png"):
        path.exists() or path.write_text("tEXtSoftware\0revnet")
        assert not may_replace(path, is_picture)


def test_a_text_is_recognized_by_its_first_bytes(tmp_path):
    path = tmp_path / "table.csv"
    path.touch()
    assert may_replace(path, begins_with(b"a,b"))
    path.write_text("a,b,c\n")
    assert may_replace(path, begins_with(b"a,b"))
    assert not may_replace(path, begins_with(b"a,c"))
    path.unlink()
    path.symlink_to(path)
    assert may_replace(path, begins_with(b"a,c")), "there is no file"


def test_the_message_names_folder_file_and_way_out(tmp_path):
    folder = tmp_path / "new" / "folder"
    make_results_folder("out_dir", folder, {"a.txt": begins_with(b"mine")})
    (folder / "a.txt").write_text("yours")
    with pytest.raises(
        ValueError,
        match=r"^`out_dir` \(='.*folder'\) holds another `a.txt`, which would be replaced; pass another folder, or "
        r"rename the file\.$",
    ):
        make_results_folder("out_dir", folder, {"a.txt": begins_with(b"mine")})
    with pytest.raises(ValueError, match=r"^`out_dir` \(='.*a.txt'\) cannot be written: File exists; pass a folder"):
        make_results_folder("out_dir", folder / "a.txt", {})
