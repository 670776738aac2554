"""The static page of a run: what it tells, how it is worded, what is drawn."""

TABLES = ("rollouts", "orm", "prm", "advantages")
"""Of a round, whose responses the page shows."""
