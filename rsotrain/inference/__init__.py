"""What is done with a trained model: evaluate, generate, export. Start at ``modes.py``.

Imports training and what lies below it, none of the rooms beside it.
"""
