"""All model families of torchvision: classification, segmentation, detection, video, optical flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.network import Builder, Network, Table

CLASSIFIERS = {
    "alexnet": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "wide_resnet50_2": 32,
    "resnext50_32x4d": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "shufflenet_v2_x0_5": 64,
    "shufflenet_v2_x1_0": 64,
    "mnasnet0_5": 64,
    "mnasnet1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
    "regnet_y_1_6gf": 64,
    "convnext_tiny": 64,
    "vgg13": 32,
    "vgg13_bn": 32,
    "vgg16": 32,
    "vgg16_bn": 32,
    "vgg19": 32,
    "vgg19_bn": 32,
    "resnet101": 64,
    "resnet152": 64,
    "wide_resnet101_2": 32,
    "resnext101_32x8d": 32,
    "resnext101_64x4d": 32,
    "densenet161": 64,
    "densenet169": 64,
    "densenet201": 64,
    "shufflenet_v2_x1_5": 64,
    "shufflenet_v2_x2_0": 64,
    "mnasnet0_75": 64,
    "mnasnet1_3": 64,
    "efficientnet_b1": 64,
    "efficientnet_b2": 64,
    "efficientnet_b3": 64,
    "efficientnet_b4": 64,
    "efficientnet_b5": 64,
    "efficientnet_b6": 64,
    "efficientnet_b7": 64,
    "efficientnet_v2_m": 64,
    "efficientnet_v2_l": 64,
    "regnet_x_800mf": 64,
    "regnet_x_1_6gf": 64,
    "regnet_x_3_2gf": 64,
    "regnet_x_8gf": 64,
    "regnet_x_16gf": 64,
    "regnet_x_32gf": 64,
    "regnet_y_800mf": 64,
    "regnet_y_3_2gf": 64,
    "regnet_y_8gf": 64,
    "regnet_y_16gf": 64,
    "regnet_y_32gf": 64,
    "convnext_small": 64,
    "convnext_base": 64,
    "convnext_large": 64,
    "swin_t": 64,
    "swin_s": 64,
    "swin_b": 64,
    "swin_v2_t": 64,
    "swin_v2_s": 64,
    "swin_v2_b": 64,
}
"""Classification networks as they are, with the height of their pictures in pixels."""


def _pictures(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size)


def _classifier(name: str, size: int) -> Builder:
    def build() -> Network:
        from torchvision import models

        options: dict[str, Any] = {}
        if name in {"googlenet", "inception_v3"}:
            options = {"init_weights": True, "transform_input": True}
        return Network(models.get_model(name, weights=None, num_classes=10, **options), _pictures(size))

    return build


def _quantizable(name: str) -> Builder:
    """A classifier as it is before it is quantised: sums and concatenations are modules."""

    def build() -> Network:
        from torchvision import models

        return Network(getattr(models.quantization, name)(weights=None, quantize=False, num_classes=10), _pictures(64))

    return build


def vit() -> Network:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros at first: every output would be zero
    return Network(model, _pictures(32))


def swin_v1() -> Network:
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    )
    return Network(model, _pictures(64))


def swin_v2() -> Network:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    return Network(model, _pictures(64))


def maxvit() -> Network:
    from torchvision.models import MaxVit

    model = MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[32, 64],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return Network(model, _pictures(64))


def _vision_transformer(name: str) -> Builder:
    def build() -> Network:
        from torchvision import models

        model = models.get_model(name, weights=None, num_classes=10, image_size=64)
        nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros at first: every output would be zero
        return Network(model, _pictures(64))

    return build


def _segmenter(name: str) -> Builder:
    def build() -> Network:
        from torchvision.models import segmentation

        make = getattr(segmentation, name)
        return Network(make(weights=None, weights_backbone=None, num_classes=5), _pictures(64))

    return build


def _detector(name: str, size: int = 64, **options: Any) -> Builder:
    """A detector that keeps a few boxes whatever their score, so that there is something to compare."""

    def build() -> Network:
        from torchvision.models import detection

        make = getattr(detection, name)
        fixed = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}
        model = make(weights=None, weights_backbone=None, num_classes=5, **fixed, **options)
        side = 320 if name.startswith("ssd") else size
        return Network(model, ([torch.rand(3, side, side)],), rows_vary=True)

    return build


TWO_STAGES = {
    "box_score_thresh": 0.0,
    "box_detections_per_img": 8,
    "rpn_pre_nms_top_n_test": 16,
    "rpn_post_nms_top_n_test": 8,
}
ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 16, "detections_per_img": 8}


def _fixed_proposals(model: Any, images: list[Tensor]) -> list[Any]:
    """Run a two-stage detector on boxes that are given, as in training: no suppression decides what is computed."""
    pictures, _ = model.transform(images)
    features = model.backbone(pictures.tensors)
    objectness, deltas = model.rpn.head(list(features.values()))
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 8.0, 60.0, 32.0]], dtype=pictures.tensors.dtype)]
    heads = model.roi_heads
    sizes = pictures.image_sizes
    found = [*objectness, *deltas]
    found += heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
    if heads.has_mask():
        found.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes))))
    if heads.has_keypoint():
        found.append(heads.keypoint_predictor(heads.keypoint_head(heads.keypoint_roi_pool(features, boxes, sizes))))
    return found


def _two_stages(name: str) -> Builder:
    def build() -> Network:
        net = _detector(name)()
        return Network(net.model, net.inputs, lambda model, inputs: _fixed_proposals(model, inputs[0]))

    return build


def _one_stage(name: str) -> Builder:
    def run(model: Any, inputs: Any) -> Any:
        pictures, _ = model.transform(inputs[0])
        features = model.backbone(pictures.tensors)
        return model.head(list(features.values()) if isinstance(features, dict) else [features])

    def build() -> Network:
        net = _detector(name)()
        return Network(net.model, net.inputs, run)

    return build


def _video(name: str, frames: int, size: int) -> Builder:
    def build() -> Network:
        from torchvision.models import video

        model = getattr(video, name)(weights=None, num_classes=10)
        return Network(model, torch.randn(1, 3, frames, size, size))

    return build


def mvit() -> Network:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(heads: int, width: int, out: int, stride: list[int]) -> MSBlockConfig:
        return MSBlockConfig(heads, width, out, [3, 3, 3], [1, 2, 2], stride, [1, 2, 2])

    blocks = [
        MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    model = MViT(
        spatial_size=(64, 64),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )
    return Network(model, torch.randn(1, 3, 4, 64, 64))


def swin3d() -> Network:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[2, 4, 4],
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return Network(model, torch.randn(1, 3, 4, 64, 64))


def _flow(name: str) -> Builder:
    def build() -> Network:
        from torchvision.models import optical_flow

        model = getattr(optical_flow, name)(weights=None)
        return Network(model, (_pictures(128, 1), _pictures(128, 1), 2))

    return build


def table() -> Table:
    """Every network of the family, by name."""
    found: Table = {name: _classifier(name, size) for name, size in CLASSIFIERS.items()}
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "googlenet"):
        found[f"quantizable_{name}"] = _quantizable(name)
    found.update({"vit": vit, "swin_v1": swin_v1, "swin_v2": swin_v2, "maxvit": maxvit})
    found.update({name: _vision_transformer(name) for name in ("vit_b_16", "vit_b_32")})
    for name in (
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    ):
        found[name] = _segmenter(name)
    found["fasterrcnn_mobilenet_v3_large_320_fpn"] = _detector("fasterrcnn_mobilenet_v3_large_320_fpn", **TWO_STAGES)
    found["fasterrcnn_mobilenet_v3_large_fpn"] = _detector("fasterrcnn_mobilenet_v3_large_fpn", **TWO_STAGES)
    found["fasterrcnn_resnet50_fpn"] = _detector("fasterrcnn_resnet50_fpn", **TWO_STAGES)
    found["maskrcnn_resnet50_fpn"] = _detector("maskrcnn_resnet50_fpn", **TWO_STAGES)
    found["keypointrcnn_resnet50_fpn"] = _detector("keypointrcnn_resnet50_fpn", **TWO_STAGES)
    found["retinanet_resnet50_fpn"] = _detector("retinanet_resnet50_fpn", **ONE_STAGE)
    found["fcos_resnet50_fpn"] = _detector("fcos_resnet50_fpn", **ONE_STAGE)
    found["ssdlite320_mobilenet_v3_large"] = _detector("ssdlite320_mobilenet_v3_large", **ONE_STAGE)
    for name in ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"):
        found[f"{name}-given_boxes"] = _two_stages(name)
    for name in ("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16"):
        found[f"{name}-heads"] = _one_stage(name)
    found["r3d_18"] = _video("r3d_18", 4, 32)
    found["mc3_18"] = _video("mc3_18", 4, 32)
    found["r2plus1d_18"] = _video("r2plus1d_18", 4, 32)
    found["s3d"] = _video("s3d", 16, 224)
    found.update({"mvit": mvit, "swin3d": swin3d})
    found.update({"raft_small": _flow("raft_small"), "raft_large": _flow("raft_large")})
    return found
