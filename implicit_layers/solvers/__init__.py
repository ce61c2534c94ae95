"""Solvers: one file a method, each a frozen dataclass that knows nothing of derivatives."""
