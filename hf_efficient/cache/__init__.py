"""Cache layers that forget or compress keys, inside transformers' own caches."""
