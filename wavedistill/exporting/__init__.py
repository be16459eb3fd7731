"""A student as a program of its own, for runtimes other than Python."""
