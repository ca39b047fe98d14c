"""`gapo study`: does it help? Every objective under label noise, same seeds and flips, with honest statistics."""
