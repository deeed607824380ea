"""Atomic writes, JSON files, content hashes and memory-mapped tensor files."""
