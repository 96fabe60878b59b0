"""What a machine is, how long something takes, how much memory it needs, and records of that."""
