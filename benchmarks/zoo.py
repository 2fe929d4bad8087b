"""Random-weight ONNX files of the public classifier zoo, exported by every exporter the proof must read.

Owns the list of architectures and how each is turned into a file. Knows nothing of the proof. Weights are
seeded and worthless: only the graph matters here. Needs torch, torchvision, timm and onnxscript.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Export:
    """One file to make: a network, an exporter (`dynamo` or `script`), an opset and an image size."""

    source: str
    network: str
    size: int = 64
    exporter: str = "dynamo"
    opset: int = 20

    @property
    def stem(self) -> str:
        """The file's name without its suffix, unique among the exports."""
        return f"{self.source}-{self.network}-{self.exporter}-{self.opset}"


# Sizes are the smallest each network accepts after its last stride, so that a whole run stays within minutes.
ZOO = (
    Export("torchvision", "resnet18"),
    Export("torchvision", "resnet50"),
    Export("torchvision", "resnext50_32x4d"),
    Export("torchvision", "regnet_y_400mf"),
    Export("torchvision", "regnet_x_400mf"),
    Export("torchvision", "alexnet", 96),
    Export("torchvision", "vgg11"),
    Export("torchvision", "vgg11_bn"),
    Export("torchvision", "squeezenet1_1"),
    Export("torchvision", "densenet121"),
    Export("torchvision", "mobilenet_v2"),
    Export("torchvision", "mobilenet_v3_small"),
    Export("torchvision", "efficientnet_b0"),
    Export("torchvision", "efficientnet_v2_s"),
    Export("torchvision", "mnasnet0_5"),
    Export("torchvision", "shufflenet_v2_x0_5"),
    Export("torchvision", "googlenet", 96),
    Export("torchvision", "inception_v3", 96),
    Export("torchvision", "convnext_tiny"),
    Export("torchvision", "vit_b_32", 224),
    Export("torchvision", "swin_t"),
    Export("timm", "resnet18"),
    Export("timm", "resnet50d"),
    Export("timm", "seresnext26d_32x4d"),
    Export("timm", "regnety_002"),
    Export("timm", "mobilenetv3_small_050"),
    Export("timm", "efficientnet_lite0"),
    Export("timm", "tf_efficientnetv2_b0"),
    Export("timm", "convnextv2_atto"),
    Export("timm", "ghostnet_050"),
    Export("timm", "repvgg_a0"),
    Export("timm", "nf_resnet26"),
    Export("timm", "mobilenetv4_conv_small"),
    Export("timm", "vit_tiny_patch16_224", 224),
    Export("torchvision", "resnet34"),
    Export("torchvision", "wide_resnet50_2"),
    Export("torchvision", "mobilenet_v3_large"),
    Export("torchvision", "shufflenet_v2_x1_0"),
    Export("timm", "resnetv2_50"),
    Export("timm", "densenet121"),
    Export("timm", "mobilenetv2_050"),
    Export("timm", "mixnet_s"),
    Export("timm", "hardcorenas_a"),
    Export("timm", "dla34"),
    Export("timm", "selecsls42"),
    Export("timm", "cspresnet50"),
    Export("timm", "mobileone_s0"),
    Export("torchvision", "resnet18", opset=18),
    Export("torchvision", "shufflenet_v2_x0_5", opset=23),
    Export("torchvision", "convnext_tiny", opset=23),
    Export("timm", "vit_tiny_patch16_224", 224, opset=23),
    Export("torchvision", "resnet18", exporter="script", opset=9),
    Export("torchvision", "mobilenet_v3_small", exporter="script", opset=9),
    Export("torchvision", "shufflenet_v2_x0_5", exporter="script", opset=9),
    Export("torchvision", "googlenet", 96, exporter="script", opset=9),
    Export("torchvision", "vgg11_bn", 224, exporter="script", opset=11),
    Export("torchvision", "shufflenet_v2_x0_5", exporter="script", opset=11),
    Export("torchvision", "densenet121", exporter="script", opset=11),
    Export("torchvision", "regnet_y_400mf", exporter="script", opset=13),
    Export("torchvision", "inception_v3", 96, exporter="script", opset=13),
    Export("torchvision", "mnasnet0_5", exporter="script", opset=13),
    Export("torchvision", "convnext_tiny", exporter="script", opset=13),
    Export("torchvision", "efficientnet_b0", exporter="script", opset=17),
    Export("torchvision", "convnext_tiny", exporter="script", opset=17),
    Export("timm", "convnextv2_atto", exporter="script", opset=17),
    Export("timm", "seresnext26d_32x4d", exporter="script", opset=17),
)


@cache
def declare_missing_operators() -> Any:
    """Declare, once, the two operators that torchvision expects from its compiled half; return their library.

    torchvision built for another torch has no compiled half and fails at import without them; no classifier
    calls them. The declaration lasts as long as the returned object.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def build(export: Export) -> Any:
    """Return the network with seeded random weights, in evaluation mode."""
    import torch

    torch.manual_seed(0)
    if export.source == "timm":
        import timm

        return timm.create_model(export.network, pretrained=False).eval()
    import torchvision

    options = {"init_weights": False} if export.network in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(export.network, weights=None, **options).eval()


def drop_weights(model: Any, keep_bytes: int = 4096) -> None:
    """Point large float initializers at a file that does not exist: the graph stays, the weights go."""
    for tensor in model.graph.initializer:
        if tensor.data_type == tensor.FLOAT and len(tensor.raw_data) > keep_bytes:
            tensor.ClearField("raw_data")
            tensor.data_location = tensor.EXTERNAL
            tensor.external_data.add(key="location", value="dropped")


def write(export: Export, folder: Path) -> Path:
    """Export one network to `folder` with a symbolic batch, without its weights; return the file's path."""
    import onnx
    import torch

    path = folder / f"{export.stem}.onnx"
    if path.exists():
        return path
    images = torch.zeros(2, 3, export.size, export.size)  # 2: torch.export would take a 1 for a constant
    dynamo = export.exporter == "dynamo"
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    full = path.with_suffix(".full")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            build(export), (images,), str(full), dynamo=dynamo, opset_version=export.opset, verbose=False,
            input_names=["x"], output_names=["logits"], external_data=False, **batch,
        )  # fmt: skip
    model = onnx.load(full)
    full.unlink()
    drop_weights(model)
    onnx.save(model, path)
    return path
