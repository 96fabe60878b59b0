"""Sparse feed-forward layers: experts, their routers, and the routers' loss."""
