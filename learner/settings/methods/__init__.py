"""The settings of the methods, by what their likelihood is made of."""
