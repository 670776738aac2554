"""What the rows of a table of rollouts say of their sampling, in tests that are not about it."""

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "engine": "fake", "engine_version": "1"}
