"""Networks by their published names, one family a file."""

from revnet.models._registry import create_model as create_model
from revnet.models._registry import list_models as list_models
from revnet.models._registry import register_model as register_model
from revnet.models.resnet import ResNet as ResNet
from revnet.models.resnet import resnet32 as resnet32
from revnet.models.revnet import RevNet as RevNet
from revnet.models.revnet import revnet38 as revnet38
