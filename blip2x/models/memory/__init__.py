"""How much memory a training step takes, worked out from the config before anything is allocated.

`ghosts` has tensors without numbers and the rules of what paddle's autograd keeps, `passes` goes with them through the models'
forward passes, `predict` adds what else is in memory.
"""
