"""Differentiation of the memory operators, and the choice between the routes. One section a function."""
