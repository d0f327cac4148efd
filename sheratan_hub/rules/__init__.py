"""The rules of a job's and a node's life. Pure: no clock, no I/O, no randomness, no await, no log."""
