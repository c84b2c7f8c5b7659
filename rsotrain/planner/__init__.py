"""``mode=plan``: the memory of a run before it starts, and advice when memory ends. Start at ``plan.py``.

It runs the training step under fake tensors, so it imports what trains; none of the rooms beside it.
"""
