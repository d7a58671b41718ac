"""What makes our layers known to other packages, one file per host; nothing else in the package imports them."""
