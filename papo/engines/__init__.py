"""The outside world behind small Protocols; each heavy library is imported in one file, inside what needs it."""
