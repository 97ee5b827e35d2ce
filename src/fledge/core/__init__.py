"""The ground floor: artifacts, stages, recipes, the runner and the one stream of events. Imports nothing heavy."""
