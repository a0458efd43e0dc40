"""The models of the zoo benchmark: one of every timm model file, and torchvision's list.

torchvision's compiled operators are not in every build, and importing it without them fails; two schemas
that nothing here calls are declared in their place.
"""

from __future__ import annotations

from typing import Any

TIMM = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
test_convnext cpubone_nano crossvit_tiny_240 cs3darknet_focus_s cspnext_tiny davit_tiny
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto
lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small test_nfnet
pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet
resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
xcit_nano_12_p8_224
""".split()

TORCHVISION = """
ssdlite320_mobilenet_v3_large ssd300_vgg16 fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fcos_resnet50_fpn
keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2 alexnet vit_b_16 vit_b_32
vit_l_16 vit_l_32 vit_h_14 convnext_tiny convnext_small convnext_base convnext_large densenet121
densenet169 densenet201 densenet161 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m
efficientnet_v2_l googlenet inception_v3 mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
mobilenet_v3_large mobilenet_v3_small regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf resnet18 resnet34 resnet50 resnet101 resnet152
resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2 fcn_resnet50 fcn_resnet101
deeplabv3_resnet50 deeplabv3_resnet101 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
squeezenet1_0 squeezenet1_1 vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn raft_large
swin_t swin_s swin_b shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
""".split()

NAMES = [f"timm/{name}" for name in TIMM] + [f"torchvision/{name}" for name in TORCHVISION]

_SIDE = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320, "raft_large": 128}
_library: Any = None


def import_torchvision() -> Any:
    """Import torchvision without its compiled operators."""
    global _library
    import torch

    if _library is None:
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


def dense_detector(model: Any) -> Any:
    """Backbone, neck and heads of a one-stage detector: all of it but the box post-processing, which needs NMS."""
    import torch

    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, image: Any) -> tuple[Any, ...]:
            return tuple(self.head(list(self.backbone(image).values())).values())

    return Dense().eval()


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The model with random weights in inference mode, and example inputs.

    Args:
        name: one of `NAMES`.
    """
    import torch

    torchvision = import_torchvision()
    library, _, model_name = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(model_name, pretrained=False).eval()
        return model, (torch.randn(1, *model.pretrained_cfg["input_size"]),)
    options: dict[str, Any] = {"weights": None}
    if any(part in model_name for part in ("rcnn", "fcn", "deeplab", "lraspp", "ssd", "fcos", "retina")):
        options["weights_backbone"] = None
    if model_name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision.models.get_model(model_name, **options).eval()
    if any(part in model_name for part in ("ssd", "fcos", "retina")):
        model = dense_detector(model)
    side = _SIDE.get(model_name, 224)
    image = torch.randn(1, 3, side, side)
    return model, ((image, torch.randn_like(image)) if model_name.startswith("raft") else (image,))
