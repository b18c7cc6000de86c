"""The papers' algorithms as plain loops over tasks on ``torch.autograd``.

Nothing here imports fmeta: these are the definitions that its engines are held against. Weights are dicts of
tensors, a task is ``((x, y), (x, y))``, support first, and a batch of tasks is a list of those.
"""
