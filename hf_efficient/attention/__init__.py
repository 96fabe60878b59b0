"""One mechanism per file; every module in this package is found and registered automatically."""
