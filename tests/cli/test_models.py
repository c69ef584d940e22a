from revnet.models import list_models


def test_models_are_listed_with_the_published_parameter_counts(revnet):
    code, output, errors = revnet("models")
    assert (code, errors) == (0, "")
    heading, *rows = (line.split() for line in output.splitlines())
    assert heading == ["name", "parameters", "MFLOPs", "reversible"]
    assert [row[0] for row in rows] == list_models()
    table = {name: cells for name, *cells in rows}
    assert table["resnet32"][0::2] == ["464,154", "no"]
    assert table["revnet38"][0::2] == ["464,890", "yes"]
    # 68.8 million multiply-adds of convolutions and the linear layer, two FLOPs each
    assert table["resnet32"][1] == "137.7"
