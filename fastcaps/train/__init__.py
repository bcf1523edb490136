"""Training runs on image data: ``fastcaps train``, ``evaluate`` and ``show``."""
