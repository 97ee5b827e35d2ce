"""What a run does with its machine and inside its model, told as metrics; nothing here changes a result."""
