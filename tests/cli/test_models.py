from revnet.models import list_models


def test_lists_models_as_published(revnet):
    code, output, errors = revnet("models")
    assert (code, errors) == (0, "")
    assert len({len(line) for line in output.splitlines()}) == 1, "aligned"
    heading, *rows = (line.split() for line in output.splitlines())
    assert heading == ["name", "parameters", "image", "classes", "MFLOPs", "reversible"]
    assert [row[0] for row in rows] == list_models()
    table = {name: cells for name, *cells in rows}
    # 68.8 million multiply-adds of convolutions and the linear layer, two FLOPs each
    assert table["resnet32"] == ["464,154", "32x32", "10", "137.7", "no"]
    assert table["revnet38"] == ["464,890", "32x32", "10", "154.5", "yes"]
    # 3.86 thousand million; He et al. (2016), Deep Residual Learning, say 3.8
    assert table["resnet50"] == ["25,549,352", "224x224", "1000", "7,715.9", "no"]
    assert table["revnet104"][:3] == ["45,428,072", "224x224", "1000"]
