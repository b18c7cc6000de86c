"""Scripts that print, on the reader's machine, what the README states."""
