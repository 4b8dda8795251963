"""The scoring server: token values of a frozen value model over HTTP."""
