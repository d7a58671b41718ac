"""Whole models: which layers are quantized and how, what that did, and plans of formats by layer."""
