"""Pure maths on arrays: no I/O, no config, no torch."""
