"""Model Composer: one better model out of a zoo of checkpoints, without training."""

__version__ = "0.1.0"
