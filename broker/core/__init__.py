"""What the broker decides: no async, no I/O, no clock, no randomness; times and ids come in as arguments."""
