"""Benchmarks: ratios measured side by side. ``python -m bench SUBJECT`` writes bench/results/SUBJECT.json."""
