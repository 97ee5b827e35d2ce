"""What a training needs before it is started: parameters, memory, operations, time, money. Imports nothing heavy."""
