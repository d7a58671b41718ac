"""Drivers: how Q and the adapter are computed, compiled or in plain torch, for weights or for layers' outputs."""
