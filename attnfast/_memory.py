"""The public memory functions: documentation, checks, and the way to their kernels. One section a function."""
