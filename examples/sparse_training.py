"""Train ResNet-18 with a penalty that lets whole groups fade, try the cut as a mask, then make it.

python examples/sparse_training.py
"""

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

import prunus as tp

torch.manual_seed(0)
model = resnet18(num_classes=10)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))  # your data
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
pruner = tp.pruner.GroupNormPruner(model, images[:1], reg=5e-4, pruning_ratio=0.5, ignored_layers=["fc"])

pruner.update_regularizer()
for _ in range(3):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    pruner.regularize(model)  # adds to .grad; with a GradScaler: pruner.regularize(model, scaler=scaler)
    optimizer.step()

model.eval()
mask = pruner.soft_step()  # what step() would remove, in the forward only
masked = model(images)
print(f"masked  {tp.utils.count_params(model):,} parameters")
mask.lift()

pruner.step(optimizer=optimizer)  # momenta are cut with their parameters
print(f"pruned  {tp.utils.count_params(model):,} parameters")
print("same outputs:", torch.allclose(model(images), masked, atol=1e-4))
