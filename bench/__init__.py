"""Benchmarks: ratios measured side by side in one run. ``python -m bench SUBJECT`` writes bench/results/SUBJECT.json."""
