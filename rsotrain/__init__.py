"""rsotrain: memory-efficient LLM pre-training from the command line."""

__version__ = "0.1.0"
