"""The torch operators of the memory functions: allocation, fake kernels. One section a function."""
