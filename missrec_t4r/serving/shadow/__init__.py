"""Shadow traffic: proxies that mirror a share of the requests to a candidate model and compare the responses."""
