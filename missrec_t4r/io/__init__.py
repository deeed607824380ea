"""Atomic writes, content hashes and the memory-mapped tensor file."""
