"""Remove half of every group of ResNet-18 in five steps, with room for training after each.

python examples/iterative_pruner.py
"""

import torch
from torchvision.models import resnet18

import prunus as tp

model = resnet18(weights=None)
example_inputs = torch.randn(1, 3, 224, 224)
steps = 5

pruner = tp.pruner.MagnitudePruner(
    model,
    example_inputs,
    importance=tp.importance.MagnitudeImportance(p=2),
    iterative_steps=steps,
    pruning_ratio=0.5,  # of the widths at the start, after the last step
    ignored_layers=[model.fc],
)

macs, params = tp.utils.count_ops_and_params(model, example_inputs)
print(f"dense   {macs / 1e9:.2f} G MACs  {params:,} parameters")
for step in range(1, steps + 1):
    pruner.step()
    # Fine-tune here; an optimiser that you made before the step keeps its parameters.
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"step {step}  {macs / 1e9:.2f} G MACs  {params:,} parameters")
