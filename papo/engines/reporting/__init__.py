"""The static page of a run: what it tells, how it is worded, what is drawn."""
