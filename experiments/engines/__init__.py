"""What runs a grid: worker processes on this machine, or Ray on many; a killed grid goes on where it stopped."""
