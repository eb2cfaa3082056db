"""Many experts of one architecture trained together, with the numbers of the reference loop."""
