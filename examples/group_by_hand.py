"""Remove three channels of one layer, and everything that must go with them.

python examples/group_by_hand.py
"""

import torch
from torchvision.models import resnet18

import prunus as tp

model = resnet18(weights=None).eval()
example_inputs = torch.randn(1, 3, 64, 64)

# 1. Find what depends on what.
DG = tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs)

# 2. Ask for everything that goes with output channels 2, 6 and 9 of the first convolution.
group = DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
print(group.details())

# 3. Cut all of it at once, if no layer would lose its last channel.
if DG.check_pruning_group(group):
    group.prune()

print(model.conv1)
print(model.layer2[0].downsample[0])
print("output:", tuple(model(example_inputs).shape))
