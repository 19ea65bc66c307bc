"""Calibration: texts to windows of tokens, windows to statistics of every Linear's input."""
