"""Ablations: plans as data, runs that share what they can, and verdicts with intervals."""
