"""Calibration: statistics of layers' inputs, collected by running a model on data."""
