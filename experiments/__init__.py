"""What is run and measured: tasks, fine-tuning, predictions, reports and the command line."""
