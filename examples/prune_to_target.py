"""Cut a vision transformer to half of its operations, prove it, save the plan, replay it, undo it.

python examples/prune_to_target.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from torchvision.models import VisionTransformer

import prunus

model = VisionTransformer(
    image_size=64, patch_size=16, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10
).eval()
example_inputs = torch.randn(1, 3, 64, 64)
dense = copy.deepcopy(model)

# The graph is checked numerically on your own model: permuting what belongs together may not change the outputs.
print(prunus.verify(model, example_inputs))

result = prunus.prune(model, example_inputs, prunus.Target(macs=0.5))
print(result)

# The plan is data: it makes the same cuts on any copy of the dense model.
path = Path(tempfile.mkdtemp()) / "plan.json"
result.plan.save(path)
copied = copy.deepcopy(dense)
prunus.Plan.load(path).apply(copied)
with torch.no_grad():
    print("replayed plan gives the same outputs:", torch.equal(copied(example_inputs), model(example_inputs)))

result.undo()
with torch.no_grad():
    print("after undo the model is the dense one:", torch.equal(dense(example_inputs), model(example_inputs)))
