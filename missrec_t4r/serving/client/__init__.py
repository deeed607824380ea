"""The typed clients, synchronous and asynchronous, and their transports."""
