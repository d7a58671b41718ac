"""What makes our layers known to other packages; of the package, only `public` imports this, to register them."""
