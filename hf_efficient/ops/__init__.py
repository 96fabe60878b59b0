"""What mechanisms compute with: plain PyTorch functions on projected heads, any device, no N×N tensor."""
