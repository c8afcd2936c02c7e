"""Small tasks with a trained network each: what pruning does to them can be measured in minutes, on a processor."""
