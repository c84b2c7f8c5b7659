"""The trainer, evaluation, the schedule of the learning rate. Start at ``Trainer.train_step``.

Imports models, optimizers, data and ranks; knows nothing of folders, loggers or screens.
"""
