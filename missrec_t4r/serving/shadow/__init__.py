"""Shadow traffic: a proxy that mirrors requests to a candidate server and compares the answers."""
