"""Mode trees: how they are read, named and drawn."""
