"""The catalogue's entries, in the customary order: the first eight, the next six, the last six."""
