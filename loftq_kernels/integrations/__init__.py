"""Where other packages meet this one: a file for each. Nothing else in the package imports them."""
