"""The models of a run: the tiny one, trained on the spot, Llama in JAX, and those of folders and the Hub."""
