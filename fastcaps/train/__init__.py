"""Training runs on image data: ``fastcaps train``, ``evaluate`` and ``show``.

Nothing is imported here: the settings can be read without Lightning and Matplotlib.
"""
