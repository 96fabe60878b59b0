"""The benchmark of tasks that attention alone can solve: constructed models, one protocol for every mechanism, records."""
