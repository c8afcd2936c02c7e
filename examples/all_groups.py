"""Walk over all groups of a network and remove a quarter of each, chosen by your own rule.

python examples/all_groups.py
"""

import torch
from torch import nn
from torchvision.models import resnet18

import prunus as tp

model = resnet18(weights=None).eval()
example_inputs = torch.randn(1, 3, 64, 64)
importance = tp.importance.MagnitudeImportance(p=2)

_, params_before = tp.utils.count_ops_and_params(model, example_inputs)
DG = tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs)

for group in DG.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d, nn.Linear]):
    root, idxs = group[0]
    scores = importance(group)
    worst = scores.argsort()[: len(idxs) // 4].tolist()
    group.prune(idxs=[idxs[k] for k in worst])
    print(f"{root.target.name:16s} {len(idxs):4d} -> {root.target.module.out_channels:4d}, {len(group)} layers")

_, params_after = tp.utils.count_ops_and_params(model, example_inputs)
print(f"parameters: {params_before:,} -> {params_after:,}")
print("output:", tuple(model(example_inputs).shape))
