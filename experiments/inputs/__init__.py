"""From images on disk or in memory to normalised, augmented batches on the device."""
