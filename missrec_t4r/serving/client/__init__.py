"""Typed clients, synchronous and asynchronous, and their transports: gRPC, HTTP, or a bundle in this process."""
