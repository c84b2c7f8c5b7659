"""``mode=plan``: the memory of a run before it starts, and advice when memory runs out. Start at ``plan.py``.

The planner runs the training step with fake tensors, so it imports ``training`` and everything below it.
"""
