"""The command line, and the only room that knows Hydra. Start at ``entry.py``.

From here everything may be imported; ``dispatch.py`` says which package does what ``mode=…`` asks for.
"""
