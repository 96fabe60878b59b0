"""Pictures of which keys each query sees."""
