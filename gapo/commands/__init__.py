"""One module for each command of `gapo`, each with `main(arguments) -> exit status`."""
