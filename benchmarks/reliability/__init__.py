"""The fault campaign: `python -m benchmarks.reliability run|table|list`."""
