"""harken: distributed pretraining and fine-tuning of speech and audio encoders."""

__version__ = "0.1.0"
