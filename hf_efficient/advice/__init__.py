"""Which mechanism suits a checkpoint: `advise` measures candidates on the model itself and chooses."""
