"""Real networks, built at random from small configurations, that Prunus is checked on; see `zoo/run.py`."""
