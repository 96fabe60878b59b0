"""One mechanism per file; every module in this package is found and registered by itself."""
