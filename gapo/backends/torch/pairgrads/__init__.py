"""Gradients of each pair from one backward."""
