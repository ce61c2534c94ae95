"""Benchmarks: `python -m benchmarks.run` measures into JSON, `python -m benchmarks.tables` puts it into the README."""
