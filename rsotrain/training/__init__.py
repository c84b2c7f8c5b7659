"""The trainer, evaluation and the learning-rate schedule. Start at ``Trainer.train_step``.

This package imports models, optimizers, data and ranks. It does not use folders, loggers or the screen.
"""
